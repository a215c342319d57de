"""The pages of the kernel benchmark: goals are judged by the figures, and what a result does not say is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import moe_kernel_render as page

ROOT = Path(__file__).parents[1]


def rows(us: float, theirs: float, shape: str = "tp8", tokens: int = 64) -> list[dict[str, Any]]:
    """One size of one shard, ours and SGLang's W4AFP8; the floor is 100 us."""
    ours = {"shape": shape, "M": tokens, "engine": "lightship", "us": us, "floor_us": 100.0, "over_floor": us / 100}
    return [ours, {"shape": shape, "M": tokens, "engine": "sglang W4AFP8", "us": theirs}]


def judged(found: list[dict[str, Any]]) -> dict[str, bool]:
    return {what: met for what, _, met in page._goals(found)}


def test_goals_are_judged_by_the_figures() -> None:
    faster, mean = (
        "TP-8: faster than SGLang's W4AFP8 at every number of tokens",
        "TP-8: geometric mean over SGLang's W4",
    )
    floor = "TP-8: 64 tokens within 1.25x of the floor"
    good, bad = judged(rows(124, 250)), judged(rows(126, 120))
    assert good[faster]
    assert good[floor]
    assert not bad[faster]
    assert not bad[floor]
    assert [met for found in (good, bad) for what, met in found.items() if what.startswith(mean)] == [True, False]


def test_one_slower_size_misses_the_goal_of_every_size() -> None:
    found = judged(rows(100, 400) + rows(100, 99, tokens=256))
    assert not found["TP-8: faster than SGLang's W4AFP8 at every number of tokens"]


def test_a_size_that_theirs_was_not_measured_at_is_no_victory() -> None:
    found = judged(rows(100, 400) + rows(100, 99, tokens=256)[:1])
    assert not found["TP-8: faster than SGLang's W4AFP8 at every number of tokens"]


def test_the_faster_of_both_fp8_counts() -> None:
    fp8 = [{"engine": "sglang FP8", "us": 300.0}, {"engine": "sglang FP8 tuned", "us": 90.0}]
    found = judged(rows(100, 400) + [{"shape": "tp8", "M": 64} | row for row in fp8])
    assert not found["TP-8: faster than SGLang's faster FP8 at every number of tokens"]


def test_what_the_result_does_not_say_is_named() -> None:
    found = dict.fromkeys(page.PROVENANCE, "x")
    assert "does not say" not in page.provenance(found)
    assert "The file does not say: driver.\n" in page.provenance({k: v for k, v in found.items() if k != "driver"})


def test_the_committed_pages_are_those_of_the_committed_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "docs" / "moe.md").write_text((ROOT / "docs" / "moe.md").read_text())
    monkeypatch.setattr(page, "ROOT", tmp_path)
    page.render(ROOT / "benchmarks" / "moe_kernel.json")
    for name in ("benchmarks/moe_kernel.md", "docs/moe.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()


def test_a_dark_page_changes_colours_and_nothing_else() -> None:
    svg = "<svg><metadata/><metadata></metadata><path style='fill: #fffffe'/></svg>"
    dark = page.with_dark_page(svg)
    assert "prefers-color-scheme: dark" in dark
    assert '[style*="fill: #fffffe"] { fill: #0d1117 !important }' in dark
    assert dark.replace(dark[dark.index("<style>") : dark.index("</style>") + 8], "") == svg


def test_the_committed_result_names_no_folder_of_a_machine() -> None:
    result = json.loads((ROOT / "benchmarks" / "moe_kernel.json").read_text())
    assert " /" not in result["command"]
    assert not result["plans"].startswith("/")
