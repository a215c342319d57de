"""Traces are read as their owners publish them, cut and sped up, and a row that is none is named by its line."""

from pathlib import Path

import pytest

from lightship.errors import EvaluationError
from lightship.eval.load.traces import Arrival, cut, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:46.6805900,374,44
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 12, "output_length": 26, "hash_ids": [46]}
"""
TRACES = Path(__file__).parents[4] / "shared" / "data" / "traces"


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_azures_times_count_from_the_first_request_in_the_order_of_arrival(tmp_path: Path) -> None:
    first, second = read_trace(write(tmp_path, "a.csv", AZURE))
    assert first == Arrival(0.0, 374, 44)
    assert second.due == pytest.approx(4.314579, abs=1e-6)
    assert (second.prompt_tokens, second.output_tokens) == (396, 109)


def test_mooncakes_blocks_are_kept(tmp_path: Path) -> None:
    first, second = read_trace(write(tmp_path, "m.jsonl", MOONCAKE))
    assert first == Arrival(0.0, 600, 52, (46, 47))
    assert second == Arrival(pytest.approx(3.053), 12, 26, (46,))


def test_twice_the_speed_halves_the_times_and_the_cut_is_in_seconds_of_the_replay() -> None:
    trace = [Arrival(float(second), 1, 1) for second in range(100)]
    assert [x.due for x in cut(trace, 2.0, 2.0, None)] == [0, 0.5, 1, 1.5, 2]
    assert [x.due for x in cut(trace, 1.0, 50.0, 3)] == [0, 1, 2]
    assert len(cut(trace, 1.0, None, None)) == 100


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\nx,1\n", "no column GeneratedTokens"),
        ("a.csv", AZURE + "yesterday,1,1\n", "a.csv, line 4: .*yesterday"),
        ("a.csv", AZURE + "2023-11-16 18:15:50,-1,1\n", "line 4: a length is negative"),
        ("a.csv", AZURE.splitlines()[0], "has no requests"),
        ("m.jsonl", MOONCAKE + '{"timestamp": 1}\n', "m.jsonl, line 3: .*input_length"),
        ("m.jsonl", MOONCAKE.replace("[46]", "[]"), "line 2: 0 hash_ids do not cover 12 tokens"),
        ("trace.parquet", "", r"give Azure's \.csv or Mooncake's \.jsonl"),
    ],
)
def test_what_is_no_trace_is_refused_by_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_trace(write(tmp_path, name, text))


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"gone\.csv cannot be read: No such file"):
        read_trace(tmp_path / "gone.csv")


@pytest.mark.skipif(not TRACES.is_dir(), reason="needs the published traces beside the checkout")
def test_the_published_traces_are_read_whole() -> None:
    conversations = read_trace(TRACES / "azure_llm_2023_conv.csv")
    assert len(conversations) == 19_366
    assert conversations[-1].due == pytest.approx(3501.721937, abs=1e-5)
    mooncake = read_trace(TRACES / "mooncake_conversation_4000.jsonl")
    assert len(mooncake) == 4000
    assert len({block for x in mooncake for block in x.blocks}) > 70_000
