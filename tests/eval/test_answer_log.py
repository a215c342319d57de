"""The log keeps every answer that was given, whatever ended the process, and belongs to one process."""

import errno
import os
from io import FileIO
from pathlib import Path

import pytest

from lightship.errors import EvaluationError
from lightship.eval.answer_log import AnswerLog, LoggedAnswer


def answer(key: str, text: str = "It is (B).") -> LoggedAnswer:
    return LoggedAnswer(key=key, prompt="5f", text=text, finish="stop")


def test_an_answer_is_in_the_file_before_the_log_is_closed(tmp_path: Path) -> None:
    with AnswerLog.open(tmp_path / "log.jsonl") as log:
        log.add(answer("a", "two\nlines \x85 ü"))
        assert (tmp_path / "log.jsonl").read_bytes().count(b"\n") == 1


def test_a_reopened_log_has_every_answer(tmp_path: Path) -> None:
    for key in "abc":
        with AnswerLog.open(tmp_path / "log.jsonl") as log:
            log.add(answer(key, "two\nlines \x85 ü"))
    with AnswerLog.open(tmp_path / "log.jsonl") as log:
        assert [log.get(key) for key in "abcd"] == [*(answer(key, "two\nlines \x85 ü") for key in "abc"), None]


@pytest.mark.parametrize("torn", [b"{", b'{"key":"c","prompt":"5f","text":"It is (', b"\0\0\0\0"])
def test_a_torn_last_line_is_cut_off_and_the_next_answer_follows_the_whole_ones(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with AnswerLog.open(path) as log:
        log.add(answer("a"))
    with path.open("ab") as file:
        file.write(torn)
    with AnswerLog.open(path) as log:
        log.add(answer("b"))
    with AnswerLog.open(path) as log:
        assert (len(log), log.get("b")) == (2, answer("b"))


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"key":"a","prompt":"5f"}\n{"key":\n{"key":"c","prompt":"5f"}\n')
    with pytest.raises(EvaluationError, match=r"log\.jsonl:2 is not an answer"):
        AnswerLog.open(path)


def test_a_second_process_cannot_write_the_same_log(tmp_path: Path) -> None:
    with (
        AnswerLog.open(tmp_path / "log.jsonl"),
        pytest.raises(EvaluationError, match=r"another process .*log\.jsonl"),
    ):
        AnswerLog.open(tmp_path / "log.jsonl")
    AnswerLog.open(tmp_path / "log.jsonl").__exit__()


class FullDisk(FileIO):
    def write(self, _: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_and_the_answers_before_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    with AnswerLog.open(path) as log:
        log.add(answer("a"))
    monkeypatch.setattr("lightship.eval.answer_log.FileIO", FullDisk)
    with pytest.raises(EvaluationError, match=r"log\.jsonl cannot be written .*space"), AnswerLog.open(path) as log:
        log.add(answer("b"))
    monkeypatch.undo()
    with AnswerLog.open(path) as log:
        assert (len(log), log.get("a")) == (1, answer("a"))


def test_a_fresh_log_forgets_but_not_while_another_writes(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerLog.open(path) as log:
        log.add(LoggedAnswer(key="a", prompt="p", text="x"))
        with pytest.raises(EvaluationError, match="another process"):
            AnswerLog.open(path, fresh=True)
    assert path.read_bytes()
    with AnswerLog.open(path, fresh=True) as log:
        assert log.get("a") is None
    assert not path.read_bytes()
