"""A model over N tensor-parallel processes that live and die together.

Rank 0 is the process that makes `Ranks`; it loads its own shard while the others load theirs. Each step goes to the
others through a pipe, so that they may wait for it for days; the sums inside the model go over torch.distributed (gloo,
on the loopback interface). A rank whose rank 0 is gone leaves; rank 0 is told of a rank that is gone.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightship.causal_lm import load_causal_lm
from lightship.errors import LightshipError, ServingError
from lightship.experts import Activations, TensorParallel
from lightship.serving.ragged import RaggedModel, Step

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 60
"""All ranks have loaded when they connect, so that they find one another at once, or never."""


@dataclass(frozen=True)
class Shard:
    """What every rank loads."""

    path: Path
    size: int
    activations: Activations
    dtype: torch.dtype = torch.float32

    def load(self, rank: int) -> RaggedModel:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.size))
        return RaggedModel(load_causal_lm(self.path, TensorParallel(rank, self.size), self.dtype, self.activations))


class Ranks:
    """All ranks, as rank 0 sees them. The workers start, and load, as soon as this is made."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.workers: list[ForkServerProcess] = []
        self.pipes: list[Connection] = []
        self._closed = False
        self._reaping = threading.Lock()
        if shard.size > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, "transformers.models.deepseek_v3.modeling_deepseek_v3"])
            self._store = _store(0, shard.size, is_master=True)
            for rank in range(1, shard.size):
                ours, theirs = context.Pipe()
                worker = context.Process(target=_follow, args=(shard, rank, self._store.port, theirs), daemon=True)
                worker.start()
                theirs.close()
                self.workers.append(worker)
                self.pipes.append(ours)

    def load(self, on_death: Callable[[ServingError], None] | None = None) -> None:
        """Load rank 0's shard, wait for the others', and connect.

        Args:
            on_death: called, from a thread, when a worker that has loaded ends before `close`.

        Raises:
            CheckpointError, ServingError: from `load_causal_lm`; or a worker could not load its shard.
        """
        self.model = self.shard.load(0)
        for rank, (worker, pipe) in enumerate(zip(self.workers, self.pipes, strict=True), start=1):
            try:
                problem: str | None = pipe.recv()
            except EOFError:
                worker.join()
                raise _died(rank, worker) from None
            if problem is not None:
                raise ServingError(f"tensor-parallel rank {rank} cannot load: {problem}")
        if self.workers:
            if on_death:
                threading.Thread(target=self._watch, args=(on_death,), daemon=True).start()
            try:
                _connect(self._store, 0, self.shard.size)
            except RuntimeError:
                dead = self._dead_within(seconds=2)
                if dead:
                    raise dead from None
                raise

    def run(self, step: Step) -> torch.Tensor:
        """Run a step on every rank; returns rank 0's logits.

        Raises:
            ServingError: another rank has died.
        """
        message = pickle.dumps(step)
        try:
            for pipe in self.pipes:
                pipe.send_bytes(message)
            return self.model.run(step)
        except (OSError, RuntimeError):
            dead = self._dead_within(seconds=2)
            if dead:
                raise dead from None
            raise

    def close(self) -> None:
        """End all workers now, and leave the process group."""
        self._closed = True
        if dist.is_initialized():
            dist.destroy_process_group()
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join()

    def _watch(self, on_death: Callable[[ServingError], None]) -> None:
        dead = self._dead_within(None)
        if dead and not self._closed:
            on_death(dead)

    def _dead_within(self, seconds: float | None) -> ServingError | None:
        wait([worker.sentinel for worker in self.workers], seconds)
        with self._reaping:  # an exit code can be read once
            return next((_died(r, w) for r, w in enumerate(self.workers, start=1) if not w.is_alive()), None)


def _follow(shard: Shard, rank: int, port: int, pipe: Connection) -> None:
    """A worker's life: load, connect, run the steps that rank 0 sends until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        model = shard.load(rank)
    except LightshipError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    _connect(_store(port, shard.size), rank, shard.size)
    while True:
        try:
            step: Step = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        model.run(step, logits=False)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _store(port: int, size: int, *, is_master: bool = False) -> Any:
    return dist.TCPStore(LOOPBACK, port, size, is_master, wait_for_workers=False)  # type: ignore[attr-defined]


def _connect(store: Any, rank: int, size: int) -> None:
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=CONNECT_SECONDS))
    # sums may wait for longer: for a rank that expands its weights, or is starved
    dist.distributed_c10d._set_pg_timeout(dist.constants.default_pg_timeout)


def _died(rank: int, worker: ForkServerProcess) -> ServingError:
    return ServingError(
        f"tensor-parallel rank {rank} (process {worker.pid}) ended with exit code {worker.exitcode}; "
        "the server cannot go on without it: see its output above, and start the server again"
    )
