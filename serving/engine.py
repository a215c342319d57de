"""The local engine: a thread that loads the model and runs its steps, fed by the web server's loop and answering it."""

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from lightship.errors import ServingError
from lightship.serving.generation import Generator, Piece, Sequence, SequenceError
from lightship.serving.metrics import Metrics
from lightship.serving.ranks import Ranks
from lightship.serving.sampling import Sampling

Deliver = Callable[[Piece | Exception], object]
"""Told each piece of a sequence, the last with a finish reason, or why there are none; called from engine threads."""


class Engine:
    """Runs sequences until it is stopped or fails; then `failure` says why, and everyone waiting is told.

    A sequence that fails by itself is told alone; only the model's or a rank's failure ends the engine.

    Args:
        on_ready: called once the model is loaded and warm, from the engine's thread.
    """

    def __init__(
        self,
        ranks: Ranks,
        tokenizer: Any,
        eos: set[int],
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.ranks = ranks
        self.tokenizer = tokenizer
        self.eos = eos
        self.metrics = Metrics()
        self.ready = False
        self.failure: Exception | None = None
        self._on_ready = on_ready
        self._stopping = False
        self._lock = threading.Lock()
        self._inbox: SimpleQueue[Callable[[Generator], None]] = SimpleQueue()
        self._listeners: dict[int, Deliver] = {}
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def submit(self, sequence: Sequence, deliver: Deliver) -> None:
        """Generate `sequence`, telling `deliver`.

        Raises:
            ServingError: the engine has failed or stopped.
        """
        with self._lock:
            if self.failure or self._stopping:
                raise ServingError(f"the engine has stopped: {self.failure or 'the server is shutting down'}")
            self._listeners[sequence.id] = deliver
        self.metrics.prompt_tokens.inc(len(sequence.prompt))
        self._inbox.put(lambda generator: generator.add(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Nobody wants this sequence any more."""
        if self._listeners.pop(sequence.id, None):
            self._inbox.put(lambda generator: generator.cancel(sequence))

    def stop(self, seconds: float = 10) -> None:
        """End the thread, waiting for the step in progress, and the workers."""
        with self._lock:
            self._stopping = True
        self._inbox.put(lambda _: None)
        self._thread.join(1 if self.failure else seconds)  # a thread that waits for a dead rank may never end
        self.ranks.close()

    def _live(self) -> None:
        try:
            self.ranks.load(self._fail)
            generator = Generator(self.ranks.run, self.tokenizer, self.eos)
            _warm_up(generator)
            self.ready = True
            self._on_ready()
            while not self._stopping:
                self._take_messages(generator)
                if not generator.idle:
                    self._deliver(generator.step())
                self.metrics.running.set(len(generator.running))
                self.metrics.waiting.set(len(generator.waiting))
        except Exception as error:
            self._fail(error)

    def _take_messages(self, generator: Generator) -> None:
        """Hand on all messages, waiting for one if there is nothing else to do."""
        try:
            self._inbox.get(block=generator.idle)(generator)
            while True:
                self._inbox.get_nowait()(generator)
        except Empty:
            pass

    def _deliver(self, pieces: list[tuple[Sequence, Piece | SequenceError]]) -> None:
        now = time.perf_counter()
        for sequence, piece in pieces:
            if isinstance(piece, SequenceError):
                deliver = self._listeners.pop(sequence.id, None)
            elif piece.finish_reason:
                self.metrics.generated_tokens.inc(len(sequence.generated))
                self.metrics.sequence_seconds.observe(now - sequence.submitted)
                assert sequence.first_token is not None
                self.metrics.time_to_first_token.observe(sequence.first_token - sequence.submitted)
                deliver = self._listeners.pop(sequence.id, None)
            else:
                deliver = self._listeners.get(sequence.id)
            if deliver:
                deliver(piece)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            if self.failure or self._stopping:
                return
            self.failure = error
            self.ready = False
            listeners, self._listeners = self._listeners, {}
        for deliver in listeners.values():
            deliver(ServingError(f"the engine has stopped: {error}"))


def _warm_up(generator: Generator) -> None:
    """Run one token through every rank: the experts expand their weights on first use, which takes time and memory."""
    generator.add(Sequence([0], Sampling(max_tokens=1, temperature=0)))
    [(_, piece)] = generator.step()
    if isinstance(piece, SequenceError):
        raise piece
