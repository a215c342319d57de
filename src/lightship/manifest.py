"""The manifest of a written checkpoint: every file's size and SHA-256, and what it was made from. It is written last.

A directory with a manifest is complete; the manifest's own digest names the checkpoint wherever a release refers to it.
"""

from pathlib import Path
from typing import Any

import msgspec

from lightship.checkpoint import MANIFEST
from lightship.errors import CheckpointError
from lightship.files import digest_of_file, read_json, write_json
from lightship.progress import tracked


class FileEntry(msgspec.Struct, frozen=True):
    """A file's content."""

    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint directory holds. No time and no host stand in it: the same inputs give the same bytes."""

    format: str
    lightship: str
    source_digest: str
    calibration_text_digest: str
    quantization: dict[str, Any]
    experts_without_tokens: list[str]
    files: dict[str, FileEntry]


def describe_files(path: Path) -> dict[str, FileEntry]:
    """Every file of the directory, by name."""
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name != MANIFEST)
    return {p.name: FileEntry(p.stat().st_size, digest_of_file(p)) for p in tracked(files, "checksums")}


def write_manifest(path: Path, manifest: Manifest) -> str:
    """Write the manifest into the directory; returns its digest."""
    write_json(path / MANIFEST, manifest)
    return digest_of_file(path / MANIFEST)


def read_manifest(path: Path) -> Manifest:
    """The directory's manifest.

    Raises:
        LightshipError: there is none (the quantization did not finish), or it is not a manifest.
    """
    return read_json(path / MANIFEST, Manifest)


def check_files(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: names the file that is missing, changed, or not in the manifest.
    """
    expected, found = read_manifest(path).files, describe_files(path)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{path / name} is missing, the manifest lists it; quantize again")
        if name not in expected:
            raise CheckpointError(f"{path / name} is not in the manifest; remove it or quantize again")
        if found[name] != expected[name]:
            raise CheckpointError(
                f"{path / name} has changed since it was quantized: {found[name].bytes} bytes with SHA-256 "
                f"{found[name].sha256[:12]}, the manifest says {expected[name].bytes} and "
                f"{expected[name].sha256[:12]}; quantize again"
            )
