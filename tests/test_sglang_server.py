"""The benchmark of real servers: when a server is said to agree with the local engine, and what its medians are."""

from typing import Any

import pytest
from benchmarks.sglang_server import FIGURES, _judge, _medians

DIFFERENCE = "mean_absolute_difference to the local engine"


def judged(**servers: tuple[float, float]) -> dict[str, Any]:
    """Whether each server agrees, by its mean absolute difference and its shift of the mean."""
    entry: dict[str, Any] = {
        "servers": {
            name: {
                DIFFERENCE: difference,
                "mean_log_probability": -2.2 + shift,
                "mean_log_probability, local engine": -2.2,
            }
            for name, (difference, shift) in servers.items()
        }
    }
    _judge(entry, {name: [0.0] for name in servers})
    return {name: found["agrees"] for name, found in entry["servers"].items()}


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
