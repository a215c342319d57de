"""The rows of a text source, one at a time: JSON lines, plain text, parquet, folders of these, Hugging Face datasets.

    for row in read_rows(TextSource(scene="code", path="code.jsonl")): print(row.where, row.value)

Only as much is read as is asked for, and never more than the first gibibyte of a source's files. The digest covers just
that part, so that a file of a hundred gigabytes is neither read nor hashed whole.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightship.errors import LightshipError
from lightship.recipe import TextSource

READ_LIMIT = 1 << 30
"""Bytes of a source's files that are read at most, and all that its digest covers."""
PIECE_BYTES = 1 << 16
"""A text file is one document, and is read in pieces of whole lines of about this size."""
PARQUET_ROWS = 64
"""Rows of a parquet file that are decoded at once."""
COLUMNS = ("messages", "text", "tools")
SUFFIXES = (".jsonl", ".txt", ".md", ".parquet")


class Row(NamedTuple):
    """One row of a source, or a piece of a text file."""

    where: str
    """File and row, for messages to people."""
    value: dict[str, Any]
    ends: bool = True
    """Whether a document ends here."""


def read_rows(source: TextSource) -> Iterator[Row]:
    """Read a source's rows in order.

    Raises:
        LightshipError: a file is missing or of an unknown kind, a row cannot be read, a dataset cannot be loaded.
    """
    if source.dataset is not None:
        yield from _dataset_rows(source)
        return
    remaining = READ_LIMIT
    for path in source_files(source):
        if remaining <= 0:
            return
        if path.suffix == ".parquet":
            yield from _parquet_rows(path, source, remaining)
        elif path.suffix == ".jsonl":
            yield from _json_rows(path, remaining)
        else:
            yield from _text_pieces(path, source.column or "text", remaining)
        remaining -= path.stat().st_size


def digest_of_rows(source: TextSource) -> list[str]:
    """What decides a source's rows: SHA-256 of each file's read part, or a dataset's files at their commit.

    Raises:
        LightshipError: a file is missing, or a dataset cannot be found.
    """
    if source.dataset is not None:
        return _dataset_digest(source)
    digests = []
    remaining = READ_LIMIT
    for path in source_files(source):
        digests.append(_digest_of_start(path, max(0, remaining)))
        remaining -= path.stat().st_size
    return digests


def source_files(source: TextSource) -> list[Path]:
    """The file of a source, or the readable files below its folder (not README.md), by name.

    Raises:
        LightshipError: there is no such file, it is of an unknown kind, or the folder holds none.
    """
    assert source.path is not None
    path = Path(source.path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file() and p.name != "README.md")
        if not files:
            raise LightshipError(
                f"the folder {path} of scene {source.scene!r} holds no {', '.join(SUFFIXES)} file; "
                "check the recipe's paths"
            )
        return files
    if not path.is_file():
        raise LightshipError(f"the text of scene {source.scene!r} is missing: {path}; check the recipe's paths")
    if path.suffix not in SUFFIXES:
        raise LightshipError(
            f"the text of scene {source.scene!r}, {path}, is none of {', '.join(SUFFIXES)}; convert or rename it"
        )
    return [path]


def _digest_of_start(path: Path, limit: int) -> str:
    """SHA-256 of a file; of one longer than `limit`, of its size, its start, and its end (a parquet file's footer)."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= limit:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{size}\n".encode())
        left = limit
        while left and (block := file.read(min(left, PIECE_BYTES))):
            digest.update(block)
            left -= len(block)
        file.seek(max(0, size - PIECE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def _lines(path: Path, limit: int) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, as long as they end within `limit` bytes."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limit + 1):
            number += 1
            limit -= len(line)
            if limit < 0:
                return
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise LightshipError(
                    f"{path}:{number} is not UTF-8 ({error.reason} at byte {error.start}); convert the file"
                ) from None


def _json_rows(path: Path, limit: int) -> Iterator[Row]:
    for number, line in _lines(path, limit):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LightshipError(f"{where} is not JSON ({error}); mend or remove the line") from None
        if not isinstance(value, dict):
            raise LightshipError(f'{where} is not {{"text": …}} or {{"messages": […]}} but {type(value).__name__}')
        yield Row(where, value)


def _text_pieces(path: Path, column: str, limit: int) -> Iterator[Row]:
    piece, first = "", 1
    for number, line in _lines(path, limit):
        if len(piece) >= PIECE_BYTES:
            yield Row(f"{path}:{first}", {column: piece}, ends=False)
            piece, first = "", number
        piece += line
    if piece:
        yield Row(f"{path}:{first}", {column: piece})


def _parquet_rows(path: Path, source: TextSource, limit: int) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise _missing_extra("pyarrow", str(path)) from None

    try:
        with parquet.ParquetFile(path) as file:
            wanted = {source.column, *COLUMNS}
            columns = [name for name in file.schema_arrow.names if name in wanted]
            if source.column is not None and source.column not in columns:
                raise LightshipError(
                    f"{path} has no column {source.column!r}; it has {', '.join(file.schema_arrow.names)}"
                )
            number = 0
            for group in range(file.num_row_groups):
                if _end_of_group(file.metadata.row_group(group)) > limit:
                    return
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns):
                    for value in batch.to_pylist():
                        number += 1
                        yield Row(f"{path}: row {number}", value)
    except (pyarrow.ArrowException, OSError) as error:
        raise LightshipError(f"{path} is not a readable parquet file ({error}); write or download it again") from error


def _end_of_group(group: Any) -> int:
    chunks = [group.column(i) for i in range(group.num_columns)]
    return max(
        min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) + c.total_compressed_size
        for c in chunks
    )


def _dataset_rows(source: TextSource) -> Iterator[Row]:
    datasets = _import_datasets(source)
    name, number = _dataset_name(source), 0
    try:
        rows = datasets.load_dataset(
            source.dataset, source.config, split=source.split or "train", revision=source.revision, streaming=True
        )
        for number, value in enumerate(rows, start=1):
            yield Row(f"{name}: row {number}", value)
    except Exception as error:  # datasets raises another class for each thing that can go wrong
        raise _unusable_dataset(f"{name} after row {number}" if number else name, error) from error


def _dataset_digest(source: TextSource) -> list[str]:
    """The dataset's files: those on the Hub by their address, which holds the commit; local ones by their content."""
    datasets = _import_datasets(source)
    name = _dataset_name(source)
    split = source.split or "train"
    try:
        builder = datasets.load_dataset_builder(source.dataset, source.config, revision=source.revision)
    except Exception as error:  # as above
        raise _unusable_dataset(name, error) from error
    if not builder.config.data_files:  # a copy in the local cache, whose files cannot be told from its name
        return [str(builder.hash)]
    files = {str(name): paths for name, paths in builder.config.data_files.items()}.get(split)
    if files is None:
        raise _unusable_dataset(name, ValueError(f"there is no split {split!r}"))
    return [_digest_of_start(Path(f), READ_LIMIT) if Path(f).is_file() else str(f) for f in files]


def _dataset_name(source: TextSource) -> str:
    return f"{source.dataset}{f'@{source.revision}' if source.revision else ''}/{source.split or 'train'}"


def _import_datasets(source: TextSource) -> Any:
    try:
        import datasets
    except ImportError:
        raise _missing_extra("datasets", f"the dataset {source.dataset}") from None
    return datasets


def _missing_extra(package: str, what: str) -> LightshipError:
    return LightshipError(f"{what} needs the package {package}: pip install 'lightship[text]'")


def _unusable_dataset(name: str, error: Exception) -> LightshipError:
    return LightshipError(
        f"the dataset {name} cannot be read ({type(error).__name__}: {error}); check name, revision, config and split, "
        "and the network, or name a local copy by `path`"
    )
