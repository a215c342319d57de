"""Reading ahead of the computation and writing behind it, so that disk and processor work at the same time."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
UNSYNCED = 64
"""Written units that may wait to be journaled, beside as many that are being waited for: a crash loses no more."""
SYNC_SECONDS = 1.0
"""Between two waits for the disk, each of which holds up its reading."""

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


def _nothing() -> None: ...


@contextmanager
def cached_ahead(read: Callable[[K], object], keys: Iterable[K]) -> Iterator[None]:
    """Meanwhile read `keys` on other threads and drop what was read: the system's page cache then holds it."""
    stop = threading.Event()

    def run() -> None:
        for _ in read_ahead(read, keys):
            if stop.is_set():
                return

    with ThreadPoolExecutor(1, thread_name_prefix="cache") as pool:
        reading = pool.submit(run)
        try:
            yield
        finally:
            stop.set()
    reading.result()


class _Unit(NamedTuple):
    name: str
    tensors: Tensors
    record: Record | None
    before: Callable[[], object]
    after: Callable[[], object]


class Writer:
    """Two threads: one writes finished units to their shards, the other waits for the disk and journals them, as many
    at a time as were written meanwhile.

    Use it as a context: leaving it waits for everything, or stops at once after an error.
    """

    def __init__(self, shards: Shards, journal: Journal) -> None:
        self._shards = shards
        self._journal = journal
        # None: wait for the disk now.
        self._unwritten: queue.Queue[_Unit | None] = queue.Queue(WAITING)
        self._written: queue.Queue[tuple[_Unit, list[str]] | None] = queue.Queue(UNSYNCED)
        self._ending = False
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=run, name=run.__name__.strip("_"), daemon=True) for run in (self._write, self._sync)
        ]

    def __enter__(self) -> "Writer":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._error = self._error or RuntimeError("the computation failed")
        self._ending = True
        self._unwritten.put(None)
        for thread in self._threads:
            thread.join()
        if kind is None and self._error:
            raise self._error

    def put(
        self,
        unit: str,
        tensors: Tensors,
        record: Record | None = None,
        *,
        before: Callable[[], object] = _nothing,
        after: Callable[[], object] = _nothing,
    ) -> None:
        """Write `tensors` (on any device) and then journal the unit; raises what an earlier write has met.

        Args:
            before: called on the writing thread ahead of the tensors; what it does must be durable when it returns.
            after: called when the unit is in the journal.
        """
        if self._error:
            raise self._error
        self._unwritten.put(_Unit(unit, tensors, record, before, after))

    def flush(self) -> None:
        """Wait until every unit that was put is in the journal; raises what a write has met."""
        self._unwritten.put(None)
        self._unwritten.join()
        self._written.join()
        if self._error:
            raise self._error

    def _write(self) -> None:
        while True:
            unit = self._unwritten.get()
            if unit and not self._error:
                with self._noting_errors():
                    unit.before()
                    names = []
                    for name, tensor in unit.tensors:
                        self._shards.write(name, tensor.cpu())
                        names.append(name)
                    self._written.put((unit, names))
            if unit is None:
                self._written.put(None)
            self._unwritten.task_done()
            if unit is None and self._ending:
                return

    def _sync(self) -> None:
        begun = 0.0
        while True:
            taken = self._gathered(until=begun + SYNC_SECONDS)
            begun = time.monotonic()
            units = [pair for pair in taken if pair is not None]
            if units and not self._error:
                with self._noting_errors():
                    self._shards.sync([name for _, names in units for name in names])
                    self._journal.append((unit.name, unit.record) for unit, _ in units)
                    for unit, _ in units:
                        unit.after()
            for _ in taken:
                self._written.task_done()
            if len(units) < len(taken) and self._ending:
                return

    def _gathered(self, until: float) -> list[tuple[_Unit, list[str]] | None]:
        """What is written by that time, or UNSYNCED units, or those before a None, and that."""
        taken = [self._written.get()]
        while taken[-1] is not None and len(taken) < UNSYNCED:
            try:
                taken.append(self._written.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                break
        return taken

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._error = self._error or error
