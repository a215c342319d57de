"""The benchmark of real servers: when a server is said to agree with the local engine, and what its medians are."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.sglang_server import (
    DISTANCE,
    FIGURES,
    PAGE,
    _judge,
    _medians,
    differences,
    merge,
    together,
    write_table,
)

ROOT = Path(__file__).parents[1]


def entry_of(date: str = "2026-11-25T10:00:00+00:00", **servers: tuple[float, float]) -> dict[str, Any]:
    """A run's servers, by their mean absolute difference and their shift of the mean."""
    return {
        "date": date,
        "gpu": "H100",
        "torch": "2.11",
        "sglang": "0.5.17",
        "flags": "--tp 1",
        "servers": {
            name: {
                DISTANCE: difference,
                "mean_log_probability": -2.2 + shift,
                "mean_log_probability, local engine": -2.2,
            }
            for name, (difference, shift) in servers.items()
        },
    }


def verdicts(entry: dict[str, Any]) -> dict[str, bool]:
    return {name: found["agrees"] for name, found in entry["servers"].items()}


def judged(**servers: tuple[float, float]) -> dict[str, Any]:
    """Whether each server agrees."""
    entry = entry_of(**servers)
    _judge(entry)
    return verdicts(entry)


def test_servers_that_differ_as_fp8_does_agree() -> None:
    assert judged(fp8=(0.124, 0.001), stock=(0.127, -0.002), plugin=(0.128, 0.003)) == {
        "fp8": True,
        "stock": True,
        "plugin": True,
    }


def test_a_server_that_differs_more_than_fp8_does_not_agree() -> None:
    assert judged(fp8=(0.1, 0.0), plugin=(0.12, 0.0))["plugin"] is False


def test_a_wrong_fp8_server_excuses_nobody() -> None:
    assert judged(fp8=(2.58, 0.0), stock=(2.59, 0.0)) == {"fp8": False, "stock": False}


def test_without_fp8_the_absolute_limit_holds() -> None:
    assert judged(plugin=(0.19, 0.0))["plugin"] is True
    assert judged(plugin=(0.21, 0.0))["plugin"] is False


def test_a_shifted_mean_does_not_agree() -> None:
    assert judged(fp8=(0.12, 0.0), plugin=(0.12, -0.03))["plugin"] is False


def test_medians_leave_out_the_first_round_and_failures() -> None:
    def run(server: str, number: int, rate: float) -> dict[str, Any]:
        figures = dict.fromkeys(FIGURES.values(), 1.0) | {"tokens_per_second": rate}
        return {"server": server, "concurrency": 16, "round": number} | figures

    failed = {"server": "fp8", "concurrency": 16, "round": 2, "error": "ConnectionError"}
    runs = [run("fp8", 0, 1.0), run("fp8", 1, 100.0), failed, run("plugin", 0, 1.0), run("plugin", 1, 140.0)]
    row = _medians([*runs, run("plugin", 2, 160.0)])["16"]
    assert row["fp8"]["tokens_per_second"] == 100.0
    assert row["plugin"]["tokens/s over fp8"] == pytest.approx(1.5)


def test_servers_of_two_runs_stand_together_each_with_its_date_and_are_judged_by_the_fp8_of_the_first() -> None:
    first = entry_of(fp8=(0.1, 0.0), stock=(0.11, 0.0))
    second = entry_of(date="2026-11-25T11:00:00+00:00", plugin=(0.12, 0.0))
    _judge(second)
    assert verdicts(second) == {"plugin": True}
    assert not differences(first, second)
    both = together(first, second)
    assert verdicts(both) == {"fp8": True, "stock": True, "plugin": False}
    assert [found["date"][11:13] for found in both["servers"].values()] == ["10", "10", "11"]


def test_runs_that_differ_do_not_stand_together(tmp_path: Path) -> None:
    first, file = entry_of(fp8=(0.1, 0.0)), tmp_path / "a.json"
    file.write_text(json.dumps({"demo": first}))
    for key, value in {"gpu": "H200", "sglang": "0.5.23", "flags": "", "date": "2026-11-26T00:00:00"}.items():
        other = first | {key: value}
        (tmp_path / "b.json").write_text(json.dumps({"demo": other}))
        with pytest.raises(SystemExit, match=rf"b\.json: its stage demo cannot be merged: {key}"):
            merge([file, tmp_path / "b.json"], tmp_path / "out.json")
    assert differences(first | {"runs": []}, first | {"runs": []})
    assert not (tmp_path / "out.json").exists()


def test_the_committed_page_is_that_of_the_committed_result(tmp_path: Path) -> None:
    page = tmp_path / "sglang.md"
    page.write_text(PAGE.read_text())
    write_table(ROOT / "benchmarks" / "sglang_server.json", page)
    assert page.read_text() == PAGE.read_text()
