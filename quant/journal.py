"""What is done of a quantization, on disk, so that the same command goes on after a crash.

    OUT.partial/fingerprint.json       what the work is made from; other inputs do not go on with it
    OUT.partial/journal-<writer>.jsonl a line a finished unit: an expert, a layer, the tensors beside the experts

A line is written after the unit's tensors are on the disk. Each process appends to a file of its own; a line that a
crash has torn is not counted.
"""

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from lightship.errors import LightshipError
from lightship.files import fsync, read_json, write_json
from lightship.quant.layout import refusing_a_full_disk, write_at
from lightship.records import Record

FINGERPRINT = "fingerprint.json"
R = TypeVar("R", bound=Record)
NAMED = 5
"""Changed inputs that the error names; it counts the others."""


class Entry(msgspec.Struct, frozen=True):
    """One line of the journal: the unit, and its record as JSON (null for units that have none)."""

    unit: str
    record: msgspec.Raw = msgspec.Raw(b"null")


class Journal:
    """The finished units of a work directory, and a file to append to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.done: dict[str, msgspec.Raw] = {}
        self._file: int | None = None
        self.read()

    def read(self) -> None:
        """Read what all processes have finished."""
        for path in sorted(self.directory.glob("journal-*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    entry = msgspec.json.decode(line, type=Entry)
                except msgspec.DecodeError:
                    continue
                self.done[entry.unit] = entry.record

    def append(self, entries: Iterable[tuple[str, Record | None]]) -> None:
        """Add finished units; returns when they are on the disk. Their tensors must be there before."""
        if self._file is None:
            path = self.directory / f"journal-{socket.gethostname()}-{os.getpid()}.jsonl"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            fsync(self.directory)
            # What a process of the same name left torn is ended, so that it spoils no line of ours.
            if end := os.lseek(self._file, 0, os.SEEK_END):
                write_at(self._file, b"\n", end)
        lines = b""
        for unit, record in entries:
            raw = msgspec.Raw(msgspec.json.encode(record))
            lines += msgspec.json.encode(Entry(unit, raw)) + b"\n"
            self.done[unit] = raw
        with refusing_a_full_disk(self.directory):
            write_at(self._file, lines, os.lseek(self._file, 0, os.SEEK_END))
            os.fsync(self._file)

    def record(self, unit: str, kind: type[R]) -> R:
        """The record of a finished unit."""
        return msgspec.json.decode(self.done[unit], type=kind)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def check_fingerprint(directory: Path, fingerprint: Mapping[str, str]) -> None:
    """Mark an empty work directory with what the work is made from, or see that a begun one is of the same.

    Raises:
        LightshipError: it was begun with other inputs; says which have changed, from what to what.
    """
    path = directory / FINGERPRINT
    if not path.is_file():
        write_json(path, dict(fingerprint))
        return
    begun = read_json(path, dict[str, str])
    changed = [key for key in sorted(begun.keys() | fingerprint.keys()) if begun.get(key) != fingerprint.get(key)]
    if changed:
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        said = "; ".join(f"{k}: was {_short(begun.get(k))}, is {_short(fingerprint.get(k))}" for k in changed[:NAMED])
        raise LightshipError(
            f"{directory} was begun with other inputs, and results are not mixed: {said}{more}. Run it with the inputs "
            f"that it was begun with, or remove {directory} to begin anew"
        )


def _short(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= 40 else f"{value[:12]}…"
