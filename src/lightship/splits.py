"""A dataset as a folder: one split a file, JSON lines or parquet, as people write them and as the Hub lays them out.

    python -c "from pathlib import Path; from lightship.splits import split_files; \
               print(split_files(Path('demo/questions'), 'test'))"

`test` is `test.jsonl`, `test.parquet`, or the parts `test-00000-of-00002.parquet`, in the folder or in its `data/`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from lightship.errors import EvaluationError
from lightship.files import digest_of, digest_of_file


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, in order.

    Raises:
        EvaluationError: there is none, or a part is missing.
    """
    for place in (folder, folder / "data"):
        for file in (place / f"{split}.jsonl", place / f"{split}.parquet"):
            if file.is_file():
                return [file]
        if parts := sorted(place.glob(f"{split}-*-of-*.parquet")):
            total = int(parts[0].stem.rpartition("-of-")[2])
            expected = [place / f"{split}-{n:05d}-of-{total:05d}.parquet" for n in range(total)]
            if parts != expected:
                missing = next((p for p in expected if p not in parts), parts[-1])
                raise EvaluationError(f"{missing} is missing, or from another download; fetch the whole split again")
            return parts
    raise EvaluationError(
        f"{folder / f'{split}.jsonl'} does not exist, nor {split}.parquet, nor data/{split}-00000-of-00001.parquet; "
        "check the path in the recipe's [accuracy]"
    )


def all_splits(folder: Path) -> list[str]:
    """The names of the folder's splits.

    Raises:
        EvaluationError: there is none.
    """
    files = [p for place in (folder, folder / "data") for kind in ("jsonl", "parquet") for p in place.glob(f"*.{kind}")]
    names = sorted({p.stem.partition("-")[0] for p in files})
    if not names:
        raise EvaluationError(f"{folder} holds no .jsonl or .parquet file; give a folder with one file a split")
    return names


def digest_of_splits(folder: Path, splits: list[str]) -> str:
    """SHA-256 over the files of these splits, wherever they lie.

    Raises:
        EvaluationError: a split is missing.
    """
    return digest_of({split: [digest_of_file(p) for p in split_files(folder, split)] for split in splits})


def read_split(folder: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a split, each with its place in the files, for messages.

    Raises:
        EvaluationError: a file is missing, empty, or has a row that cannot be read.
    """
    files = split_files(folder, split)
    empty = True
    for path in files:
        for row in _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path):
            empty = False
            yield row
    if empty:
        raise EvaluationError(f"{files[0]} is empty; it needs one row a question")


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise EvaluationError(
                    f"{path}:{number} is not a JSON object: {error}; mend or remove the line"
                ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise EvaluationError(f"{path} needs the package pyarrow: pip install 'lightship[text]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise EvaluationError(
            f"{path} is not a readable parquet file after row {number} ({error}); write or download it again"
        ) from error
