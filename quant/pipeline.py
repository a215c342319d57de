"""Reading ahead of the computation and writing behind it, so that disk and processor work at the same time."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from lightship.quant.journal import Journal
from lightship.quant.layout import Shards
from lightship.records import Record

K = TypeVar("K")
V = TypeVar("V")
READERS = 8
WAITING = 8
"""Units that may wait to be written before the computation waits for the disk."""

Tensors = Iterable[tuple[str, torch.Tensor]]


def read_ahead(read: Callable[[K], V], keys: Iterable[K], depth: int = READERS) -> Iterator[tuple[K, V]]:
    """Yield (key, read(key)) in order, with up to `depth` reads under way on other threads."""
    pending: deque[tuple[K, Future[V]]] = deque()
    with ThreadPoolExecutor(min(depth, READERS), thread_name_prefix="read") as pool:
        try:
            for key in keys:
                pending.append((key, pool.submit(read, key)))
                if len(pending) > depth:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()


class _Unit(NamedTuple):
    name: str
    tensors: Tensors
    record: Record | None


class Writer:
    """A thread that writes finished units to their shards and then to the journal, many with one wait for the disk.

    Use it as a context: leaving it waits for everything, or stops at once after an error.
    """

    def __init__(self, shards: Shards, journal: Journal) -> None:
        self._shards = shards
        self._journal = journal
        self._queue: queue.Queue[_Unit | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._error = self._error or RuntimeError("the computation failed")
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._error:
            raise self._error

    def put(self, unit: str, tensors: Tensors, record: Record | None = None) -> None:
        """Write `tensors` (on any device) and then journal the unit; raises what an earlier write has met."""
        if self._error:
            raise self._error
        self._queue.put(_Unit(unit, tensors, record))

    def flush(self) -> None:
        """Wait until every unit that was put is in the journal; raises what a write has met."""
        self._queue.join()
        if self._error:
            raise self._error

    def _run(self) -> None:
        while True:
            units = [self._queue.get()]
            while not self._queue.empty():
                units.append(self._queue.get_nowait())
            todo = [unit for unit in units if unit is not None]
            if todo and not self._error:
                try:
                    self._write(todo)
                except BaseException as error:
                    self._error = error
            for _ in units:
                self._queue.task_done()
            if len(todo) < len(units):
                return

    def _write(self, units: list[_Unit]) -> None:
        names: list[str] = []
        for unit in units:
            for name, tensor in unit.tensors:
                self._shards.write(name, tensor.cpu())
                names.append(name)
        self._shards.sync(names)
        self._journal.append((unit.name, unit.record) for unit in units)
