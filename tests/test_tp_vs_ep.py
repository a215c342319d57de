"""The simulation of tensor against expert parallelism gives back what was measured, and waits for the fullest rank."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.tp_vs_ep import (
    CONSTANTS,
    ENGINES,
    EXPERTS,
    RANKS,
    TIMES,
    TOP,
    Kernel,
    choose,
    count,
    demo_router,
    exchange_us,
    finding,
    layer_us,
    queries_per_minute,
    read_kernels,
    report,
    zipf_router,
)

TP = Kernel({1: 35.0, 16: 140.0, 64: 260.0, 256: 300.0, 1024: 400.0, 4096: 900.0}, EXPERTS, TOP)
EP = Kernel({1: 30.0, 16: 120.0, 64: 230.0, 256: 290.0, 1024: 380.0, 4096: 850.0}, EXPERTS // RANKS, TOP / RANKS)


@pytest.mark.parametrize("kernel", [TP, EP])
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 1024, 4096])
def test_uniform_routing_takes_the_measured_time(kernel: Kernel, tokens: int) -> None:
    assert kernel.time(tokens * kernel.pairs_a_token, kernel.touched(tokens)) == pytest.approx(kernel.us[tokens])


def test_between_measured_sizes_time_is_a_straight_line() -> None:
    assert TP.time(640 * TOP, TP.touched(640)) == pytest.approx(350.0)
    assert TP.time(8192 * TOP, EXPERTS) == pytest.approx(900 + 4096 * 500 / 3072)


def test_experts_that_are_not_touched_are_not_read() -> None:
    assert TP.time(64 * TOP, 100) == pytest.approx(260 - TP.us_an_expert * (TP.touched(64) - 100))
    assert TP.time(64 * TOP, 1) >= 35


def test_the_router_chooses_eight_experts_of_four_groups() -> None:
    chosen = choose(torch.rand(50, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert all(len(set(row.tolist())) == TOP for row in chosen)
    assert all(len(set((row // 32).tolist())) <= 4 for row in chosen)


def test_what_ranks_get_is_what_was_chosen() -> None:
    routed = count(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 32, 33, 34, 255]]))
    assert routed.pairs == [12, 3, 0, 0, 0, 0, 0, 1]
    assert routed.touched == [8, 3, 0, 0, 0, 0, 0, 1]
    assert routed.touched_at_all == 12
    assert routed.received == [2, 1, 0, 0, 0, 0, 0, 1]


def test_skew_makes_the_fullest_rank_fuller_and_expert_parallelism_slower() -> None:
    def draw(skew: float) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        draws = [zipf_router(skew)(256, generator) for _ in range(8)]
        fullest = sum(max(r.pairs) for r in draws) / 8
        return fullest, sum(layer_us("ep", 256, r, TP, EP) for r in draws) / 8

    even, uneven = draw(0.0), draw(1.0)
    assert uneven[0] > 1.3 * even[0]
    assert uneven[1] > even[1]


def test_a_step_waits_for_its_slowest_rank() -> None:
    routed = count(torch.arange(8).repeat(64, 1))  # all on the first rank
    expected = EP.time(64 * 8, 8) + CONSTANTS.other_us + CONSTANTS.other_us_a_token * 64
    assert layer_us("ep", 64, routed, TP, EP) == pytest.approx(expected + exchange_us("ep", 64, routed))


def test_both_ways_that_all_reduce_exchange_the_same() -> None:
    routed = count(torch.arange(8).repeat(64, 1))
    assert exchange_us("tp", 64, routed) == exchange_us("ep", 64, routed)
    assert exchange_us("ep", 64, routed) == pytest.approx(12 + 2 * 7 / 8 * 64 * 7168 * 2 / 300e3)


def test_the_demo_models_routing_keeps_the_number_of_pairs() -> None:
    layer = torch.randint(0, 16, (6, 20, 4), generator=torch.Generator().manual_seed(0))
    routed = demo_router([layer], 16)(64, torch.Generator().manual_seed(0))
    assert sum(routed.pairs) == 64 * TOP
    assert max(routed.touched) <= 32


def test_queries_a_minute_are_prompts_and_steps() -> None:
    steps = {CONSTANTS.prompt_tokens: 50.0, 64: 20.0}
    assert queries_per_minute(steps, 64) == pytest.approx(60_000 * 64 / (64 * 50 + CONSTANTS.output_tokens * 20))


def test_kernel_times_are_read_by_shard(tmp_path: Path) -> None:
    rows = [
        {"shape": shape, "M": tokens, "engine": "lightship", "us": us}
        for shape, kernel in (("tp8", TP), ("ep8", EP))
        for tokens, us in kernel.us.items()
    ]
    steps = {"shape": "tp8", "M": 1, "engine": "lightship, its steps", "routing": 1.9}
    failed = {"shape": "tp8", "M": 1, "engine": "sglang FP8", "error": "OutOfMemoryError"}
    (tmp_path / "times.json").write_text(json.dumps({"rows": [steps, *rows, failed]}))
    assert read_kernels(tmp_path / "times.json", "lightship") == (TP, EP)
    with pytest.raises(SystemExit, match=r"lacks 'sglang FP8' at tp8 for \[1, 64, 1024\] tokens"):
        read_kernels(tmp_path / "times.json", "sglang FP8")
    with pytest.raises(SystemExit, match=r"run benchmarks/moe_kernel\.py"):
        read_kernels(tmp_path / "other.json", "lightship")


def test_the_committed_kernel_times_can_be_read() -> None:
    for engine in ENGINES:
        assert all(4096 in kernel.us for kernel in read_kernels(TIMES, engine))


def test_the_reference_is_reproduced_only_where_both_figures_are_near() -> None:
    def found(ttft: float, queries: float) -> dict[str, object]:
        return {"routing": {"Zipf 1.0": {"tp against ep": {"ttft": ttft, "queries_per_minute": {"64": queries}}}}}

    assert "**reproduced** by Zipf 1.0 (-19.0%, +15.0%)" in finding("x", found(-0.19, 0.15))
    assert "**not reproduced**" in finding("x", found(-0.19, 0.02))
    assert "**not reproduced**" in finding("x", found(-0.10, 0.14))


def test_the_report_calls_itself_a_simulation() -> None:
    from benchmarks.tp_vs_ep import simulate

    result = {
        "command": "python -m benchmarks.tp_vs_ep simulate",
        "date": "2026-11-25",
        "times": "times.json",
        "engines": {
            "ours": {
                "kernels": {name: {"us": k.us, "us_an_expert": k.us_an_expert} for name, k in (("tp", TP), ("ep", EP))},
                "routing": {"Zipf 0.5": simulate(zipf_router(0.5), TP, EP)},
            }
        },
    }
    page = report(json.loads(json.dumps(result)))
    assert page.startswith("# TP-8 against EP-8: a simulation")
    assert "Not a measurement of eight GPUs" in page


def test_the_committed_page_is_that_of_the_committed_result() -> None:
    folder = TIMES.parent
    assert (folder / "tp_vs_ep.md").read_text() == report(json.loads((folder / "tp_vs_ep.json").read_text()))
