"""Rows of every kind of source come in order, and only as far as they are asked for."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lightship import rows
from lightship.errors import LightshipError
from lightship.recipe import TextSource
from lightship.rows import digest_of_rows, read_rows
from tests.conftest import write_lines

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def source(path: Path, **settings: Any) -> TextSource:
    return TextSource(scene="s", path=str(path), **settings)


def dataset(path: Path, **settings: Any) -> TextSource:
    return TextSource(scene="s", dataset=str(path), **settings)


def texts(given: TextSource) -> list[str]:
    return [row.value["text"] for row in read_rows(given)]


def write_parquet(path: Path, columns: dict[str, list[Any]], group: int = 2) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return path


def write_dataset(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    write_lines(folder / "data" / "train.jsonl", ["first", "second"])
    write_lines(folder / "data" / "test.jsonl", ["third"])
    return folder


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", ["two", "three"])
    (tmp_path / "a.txt").write_text("one\nstill one\n")
    (tmp_path / "nested").mkdir()
    write_parquet(tmp_path / "nested" / "c.parquet", {"text": ["four", "five", "six"]})
    (tmp_path / "README.md").write_text("not a text of the scene")
    (tmp_path / "LICENSE").write_text("nor is this")
    assert texts(source(tmp_path)) == ["one\nstill one\n", "two", "three", "four", "five", "six"]


def test_a_text_file_is_one_document_in_pieces_of_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.md"
    path.write_text("".join(f"line {i}\n" for i in range(30_000)))
    pieces = list(read_rows(source(path)))
    assert len(pieces) > 2
    assert "".join(p.value["text"] for p in pieces) == path.read_text()
    assert [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(p.value["text"].endswith("\n") for p in pieces)


def test_only_as_much_of_a_huge_file_is_read_as_is_asked_for(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "huge.jsonl", ["first", "second"])
    with path.open("r+b") as file:
        file.truncate(100 << 30)  # sparse: it takes no room on the disk
    assert [r.value["text"] for r in itertools.islice(read_rows(source(path)), 2)] == ["first", "second"]


def test_rows_and_digest_stop_at_the_same_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", [f"row {i:06}" for i in range(20_000)])
    monkeypatch.setattr(rows, "READ_LIMIT", 4096)
    read, before = texts(source(path)), digest_of_rows(source(path))
    assert 0 < len(read) < 20_000
    content = bytearray(path.read_bytes())
    content[200_000] ^= 1
    path.write_bytes(content)
    assert digest_of_rows(source(path)) == before
    assert texts(source(path)) == read
    content[100] ^= 1
    path.write_bytes(content)
    assert digest_of_rows(source(path)) != before


def test_parquet_row_groups_beyond_the_limit_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"{i}" * 500 for i in range(100)]}, group=10)
    monkeypatch.setattr(rows, "READ_LIMIT", path.stat().st_size // 2)
    assert 0 < len(texts(source(path))) < 100


def test_parquet_takes_only_the_columns_it_needs(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"body": ["a", "b", "c"], "picture": [b"1", b"2", b"3"]})
    found = list(read_rows(source(path, column="body")))
    assert [r.value for r in found] == [{"body": "a"}, {"body": "b"}, {"body": "c"}]
    assert found[2].where == f"{path}: row 3"


def test_a_missing_parquet_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"body": ["a"], "title": ["b"]})
    with pytest.raises(LightshipError, match=r"a\.parquet has no column 'text'; it has body, title"):
        list(read_rows(source(path, column="text")))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a"] * 100})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LightshipError, match=r"a\.parquet is not a readable parquet file"):
        list(read_rows(source(path)))


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(LightshipError, match=r"a\.jsonl:2 is not UTF-8 \(invalid start byte at byte 10\)"):
        list(read_rows(source(path)))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert texts(source(path)) == ["hello"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", r"the text of scene 's' is missing: .*absent\.jsonl; check the recipe's paths"),
        ("a.docx", r"a\.docx, is none of \.jsonl"),
        ("folder", r"folder of scene 's' holds no \.jsonl"),
    ],
)
def test_a_path_without_text_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.docx").touch()
    (tmp_path / "folder").mkdir()
    for read in (read_rows, digest_of_rows):
        with pytest.raises(LightshipError, match=message):
            list(read(source(tmp_path / name)))


def test_a_dataset_folder_is_read_as_the_hub_library_reads_it(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "set")
    assert texts(dataset(folder)) == ["first", "second"]
    assert texts(dataset(folder, split="test")) == ["third"]


def test_a_datasets_digest_follows_its_rows_and_its_split(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "set")
    copy = write_dataset(tmp_path / "copy")
    train = digest_of_rows(dataset(folder))
    assert train == digest_of_rows(dataset(copy))
    assert train != digest_of_rows(dataset(folder, split="test"))
    write_lines(folder / "data" / "train.jsonl", ["first", "changed"])
    assert train != digest_of_rows(dataset(folder))


def test_a_dataset_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "set")
    for given, message in (
        (dataset(folder, split="dev"), r"set/dev cannot be read .*dev.*check name, revision, config and split"),
        (TextSource(scene="s", dataset="org/name", revision="abc"), "org/name@abc/train cannot be read .*the network"),
    ):
        for read in (read_rows, digest_of_rows):
            with pytest.raises(LightshipError, match=message):
                list(read(given))


def test_a_bad_row_of_a_dataset_is_named_by_the_last_good_one(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "set")
    lines = [json.dumps({"text": "x" * 10_000}) for _ in range(2000)]
    (folder / "data" / "train.jsonl").write_text("\n".join([*lines, "not JSON"]))
    with pytest.raises(LightshipError, match=r"set/train after row \d+ cannot be read"):
        list(read_rows(dataset(folder)))


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    given = (
        dataset(tmp_path) if package == "datasets" else source(write_parquet(tmp_path / "a.parquet", {"text": ["a"]}))
    )
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LightshipError, match=rf"needs the package {package}: pip install 'lightship\[text\]'"):
        list(read_rows(given))
