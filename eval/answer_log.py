"""The answers that a server has given, a line each, so that an interrupted evaluation never asks for one twice.

    with AnswerLog.open(Path("answers.jsonl")) as log:
        log.get(key) or log.add(LoggedAnswer(key=key, prompt=…, text="The answer is (B)."))

A line is in the file before the next question is asked, so a killed process loses only what it was waiting for. The
file is synchronised to the disk every few answers; what a power failure leaves of its last line is cut off. The key is
a digest of everything that decides an answer: prompt, settings of the generation, model, and the endpoint's identity.
"""

import fcntl
import os
import time
from io import FileIO
from pathlib import Path

import msgspec

from lightship.errors import EvaluationError

SYNC_ANSWERS = 32
SYNC_SECONDS = 5.0


class LoggedAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer as the server gave it: a text, or a log-probability."""

    key: str
    prompt: str
    """SHA-256 of the prompt."""
    text: str = ""
    thinking: str | None = None
    """What the server set apart as `reasoning_content`."""
    finish: str | None = None
    """The server's `finish_reason`."""
    logprob: float | None = None
    """Of the continuation that was asked about, in nats."""
    greedy: bool = False
    """Whether that continuation is what greedy decoding gives."""


class AnswerLog:
    """An append-only file of answers, held by one process."""

    def __init__(self, path: Path, file: FileIO, answers: dict[str, LoggedAnswer]) -> None:
        self.path = path
        self._file = file
        self._answers = answers
        self._unsynced = 0
        self._synced = time.monotonic()

    @classmethod
    def open(cls, path: Path, *, fresh: bool = False) -> "AnswerLog":
        """Open the log, or begin it; if `fresh`, anew.

        Raises:
            EvaluationError: another process writes it, or a line that is not the last one cannot be read.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise EvaluationError(f"another process is asking, and writes {path}; wait for it to end") from None
        try:
            if fresh:
                file.truncate(0)
            return cls(path, file, _read(path, file))
        except EvaluationError:
            file.close()
            raise

    def __enter__(self) -> "AnswerLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        self._file.close()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> LoggedAnswer | None:
        """The answer, if it was given."""
        return self._answers.get(key)

    def add(self, answer: LoggedAnswer) -> None:
        """Keep an answer: it survives the end of this process at once, that of the machine after the next `sync`."""
        line = msgspec.json.encode(answer) + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise EvaluationError(f"{self.path} cannot be written ({error}); the answers before are kept") from error
        if written != len(line):
            raise EvaluationError(f"{self.path} takes no more bytes; make room on its disk, and run the command again")
        self._answers[answer.key] = answer
        self._unsynced += 1
        if self._unsynced >= SYNC_ANSWERS or time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until every answer is on the disk."""
        if self._unsynced:
            os.fsync(self._file.fileno())
        self._unsynced, self._synced = 0, time.monotonic()


def _read(path: Path, file: FileIO) -> dict[str, LoggedAnswer]:
    """Read what is there, and cut off a last line that was not written to its end."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    decoder = msgspec.json.Decoder(LoggedAnswer)
    answers: dict[str, LoggedAnswer] = {}
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            answer = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise EvaluationError(
                f"{path}:{number} is not an answer ({error}); remove the line, and its question will be asked again"
            ) from error
        answers[answer.key] = answer
    return answers
