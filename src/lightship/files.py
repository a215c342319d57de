"""Files that are either whole or absent: temporary name, fsync, rename. Digests of files and of values."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from lightship.errors import LightshipError

T = TypeVar("T")
PARTIAL = ".partial"
LOCK = ".lock"


def fsync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_directory(partial: Path, path: Path) -> None:
    """Give a directory of finished files its name: fsync every file and the directory, rename it, fsync its parent."""
    for file in partial.iterdir():
        fsync(file)
    publish_file(partial, path)


def publish_file(partial: Path, path: Path) -> None:
    """Give a finished file its name: fsync it, rename it, fsync its directory."""
    fsync(partial)
    partial.replace(path)
    fsync(path.parent)


@contextmanager
def locked(directory: Path, *, wait: bool) -> Iterator[None]:
    """Make the directory and hold its lock.

    Raises:
        LightshipError: another process holds it, and `wait` is false.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LightshipError(f"another process is working on {directory}; wait for it to end") from None
        yield


def clear_directory(directory: Path) -> None:
    """Remove everything in a directory but its lock."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success fsync it and rename it to `path`, on failure delete it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        publish_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with written_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` (a msgspec Struct, dict, list, …) to `path` as indented JSON, atomically."""
    write_text(path, msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def read_json(path: Path, kind: type[T]) -> T:
    """Read `path` as JSON of type `kind`.

    Raises:
        LightshipError: the file is missing, or is not a `kind`.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise LightshipError(f"{path} does not exist") from None
    except msgspec.DecodeError as error:
        raise LightshipError(f"{path} is not a valid {kind.__name__}: {error}") from error


def digest_of_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: object) -> str:
    """SHA-256 of the value's canonical JSON (keys sorted), in hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
