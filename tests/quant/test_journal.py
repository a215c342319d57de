"""A unit is finished when its whole line is in the journal, and not before."""

import os
from pathlib import Path

import pytest

from lightship.errors import LightshipError
from lightship.quant.journal import NAMED, Journal, check_fingerprint
from lightship.records import ExpertRounding


def record(expert: int) -> ExpertRounding:
    return ExpertRounding(
        expert=expert, tokens=5, how="gptq", w13_error=0.1, w2_error=0.2, w13_output_error=None, w2_output_error=0.01
    )


def test_units_and_records_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([("a", record(1)), ("b", None)])
    journal.append([("c", record(3))])
    journal.close()
    again = Journal(tmp_path)
    assert list(again.done) == ["a", "b", "c"]
    assert again.record("a", ExpertRounding) == record(1)
    assert again.record("c", ExpertRounding) == record(3)


def test_what_another_process_appends_is_seen_after_reading(tmp_path: Path) -> None:
    ours, line = Journal(tmp_path), b'{"unit":"theirs","record":null}\n'
    (tmp_path / "journal-other-1.jsonl").write_bytes(line)
    assert "theirs" not in ours.done
    ours.read()
    assert "theirs" in ours.done


def test_a_line_torn_at_any_byte_is_not_counted_and_spoils_no_other(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([("first", record(1))])
    journal.append([("second", record(2))])
    journal.close()
    (path,) = tmp_path.glob("journal-*.jsonl")
    assert str(os.getpid()) in path.name
    whole = path.read_bytes()
    begin = whole.index(b"\n") + 1
    for end in range(begin, len(whole)):
        path.write_bytes(whole[:end])
        resumed = Journal(tmp_path)
        assert list(resumed.done) == ["first"]
        resumed.append([("third", record(3))])
        resumed.close()
        # All of the line but its end is a whole entry, and its tensors were on the disk before it was begun.
        second = {"second"} if end == len(whole) - 1 else set()
        assert set(Journal(tmp_path).done) == {"first", "third"} | second


def test_the_fingerprint_names_what_changed_and_counts_the_rest(tmp_path: Path) -> None:
    before = {f"input {i}": "1" for i in range(NAMED + 3)}
    check_fingerprint(tmp_path, before)
    check_fingerprint(tmp_path, before)
    with pytest.raises(LightshipError, match=r"mixed: input 2: was 1, is 7; new: was absent, is 1\. Run"):
        check_fingerprint(tmp_path, before | {"input 2": "7", "new": "1"})
    with pytest.raises(LightshipError, match="input 4: was 1, is absent and 3 more"):
        check_fingerprint(tmp_path, {})
    check_fingerprint(tmp_path, before)
