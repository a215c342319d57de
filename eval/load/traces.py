"""Traces of real services: when requests arrived, how long prompts and answers were, and which prefixes they shared.

    rows = read_trace(Path("AzureLLMInferenceTrace_conv.csv"))
    rows = cut(rows, speed=2.0, seconds=60)

Azure's LLM inference traces are CSV (`TIMESTAMP,ContextTokens,GeneratedTokens`), Mooncake's are JSON lines (`timestamp`
in ms, `input_length`, `output_length`, `hash_ids`: an id for each 512 tokens of the prompt, equal ids for equal
prefixes).
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import msgspec

from lightship.errors import EvaluationError

MOONCAKE_BLOCK_TOKENS = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    due: float
    """Seconds after the trace's first request."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Ids of the prompt's blocks, `MOONCAKE_BLOCK_TOKENS` each, the last perhaps shorter; empty: nothing is shared."""


class MooncakeRow(msgspec.Struct):
    """A line of a Mooncake trace."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path) -> list[Arrival]:
    """Read a trace, by its file's ending, in the order of arrival.

    Raises:
        EvaluationError: the file is missing, is neither .csv nor .jsonl, or a row is not one of the format.
    """
    readers = {".csv": _read_azure, ".jsonl": _read_mooncake}
    if path.suffix not in readers:
        raise EvaluationError(f"{path} is no trace: give Azure's .csv or Mooncake's .jsonl")
    try:
        arrivals = list(readers[path.suffix](path))
    except OSError as error:
        raise EvaluationError(f"the trace {path} cannot be read: {error.strerror}") from error
    if not arrivals:
        raise EvaluationError(f"the trace {path} has no requests")
    arrivals.sort(key=lambda x: x.due)
    return [replace(x, due=x.due - arrivals[0].due) for x in arrivals]


def cut(arrivals: Sequence[Arrival], speed: float, seconds: float | None, requests: int | None) -> list[Arrival]:
    """The trace's beginning, replayed `speed` times as fast: what is due within `seconds` of the replay, and at most
    `requests` of it."""
    faster = (replace(x, due=x.due / speed) for x in arrivals[:requests])
    return [x for x in faster if seconds is None or x.due <= seconds]


def _read_azure(path: Path) -> Iterator[Arrival]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if missing := [c for c in AZURE_COLUMNS if c not in (rows.fieldnames or ())]:
            raise EvaluationError(f"{path} is not Azure's trace: it has no column {', '.join(missing)}")
        for number, row in enumerate(rows, 2):
            try:
                when = datetime.fromisoformat(row["TIMESTAMP"].strip())
                due = when.timestamp() if when.tzinfo else (when - datetime(1970, 1, 1)).total_seconds()  # noqa: DTZ001
                yield _checked(Arrival(due, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
            except (ValueError, TypeError, AttributeError) as error:
                raise EvaluationError(f"{path}, line {number}: {error}; it is not a row of Azure's trace") from error


def _read_mooncake(path: Path) -> Iterator[Arrival]:
    decode = msgspec.json.Decoder(MooncakeRow).decode
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = decode(line)
                arrival = Arrival(row.timestamp / 1000, row.input_length, row.output_length, tuple(row.hash_ids))
                if arrival.prompt_tokens > len(arrival.blocks) * MOONCAKE_BLOCK_TOKENS:
                    raise ValueError(f"{len(arrival.blocks)} hash_ids do not cover {arrival.prompt_tokens} tokens")
                yield _checked(arrival)
            except (msgspec.MsgspecError, ValueError) as error:
                raise EvaluationError(f"{path}, line {number}: {error}; it is not a row of Mooncake's trace") from error


def _checked(arrival: Arrival) -> Arrival:
    if arrival.prompt_tokens < 0 or arrival.output_tokens < 0:
        raise ValueError(f"a length is negative: {arrival.prompt_tokens}, {arrival.output_tokens}")
    return arrival
