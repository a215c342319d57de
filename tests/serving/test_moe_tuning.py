"""Which plan a call gets: from a table, or by the rule."""

from pathlib import Path

import msgspec
import pytest

from lightship.errors import ServingError
from lightship.serving.moe import tuning
from lightship.serving.moe.tuning import (
    SHAPES,
    Down,
    Entry,
    GateUp,
    Measured,
    Plan,
    Shape,
    Table,
    parse_shape,
    parse_tokens,
)

SHAPE = SHAPES["tp8"]
PLANS = [Plan(GateUp(split=2)), Plan(GateUp(64, short=16), Down(32, walk=2))]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of one shape, measured at 16 and at 256 tokens."""
    measured = [Measured(tokens, plan, 1.0) for tokens, plan in zip((16, 256), PLANS, strict=True)]
    path = tmp_path / "Some_GPU.json"
    path.write_bytes(msgspec.json.encode(Table("Some GPU", "3.6.0", "2026-11-25", [Entry(SHAPE, measured)])))
    return path


def test_a_call_takes_the_plan_at_or_above_its_number_of_tokens_and_the_rules_beyond(table: Path) -> None:
    entries = tuning.read_table(table)
    for tokens, plan in ((1, PLANS[0]), (16, PLANS[0]), (17, PLANS[1]), (256, PLANS[1])):
        assert tuning.plan_for("any", SHAPE, tokens, entries) == plan
    assert tuning.plan_for("any", SHAPE, 257, entries) == tuning.rule(SHAPE, 257)
    assert tuning.plan_for("any", SHAPES["ep8"], 16, entries) == tuning.rule(SHAPES["ep8"], 16)


def test_a_shipped_table_is_found_by_the_devices_name(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TABLES", table.parent)
    tuning.shipped.cache_clear()
    assert tuning.plan_for("Some GPU", SHAPE, 16) == PLANS[0]
    assert tuning.plan_for("Another GPU", SHAPE, 16) == tuning.rule(SHAPE, 16)


def test_a_device_without_a_table_takes_its_stand_ins(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TABLES", table.parent)
    monkeypatch.setattr(tuning, "STAND_INS", {"New GPU": "Some GPU"})
    tuning.shipped.cache_clear()
    assert tuning.plan_for("New GPU", SHAPE, 16) == PLANS[0]
    assert tuning.table_for("New GPU", SHAPE) == "Some_GPU.json"
    (table.parent / "New_GPU.json").write_bytes(msgspec.json.encode(Table("New GPU", "3.6.0", "2026-11-25", [])))
    tuning.shipped.cache_clear()
    assert tuning.plan_for("New GPU", SHAPE, 16) == tuning.rule(SHAPE, 16)
    assert tuning.table_for("New GPU", SHAPE) is None


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_ranks_of_deepseek_v3_have_shipped_plans_at_every_size_that_a_launch_has(device: str) -> None:
    tuning.shipped.cache_clear()
    for shape in SHAPES.values():
        assert tuning.table_for(device, shape) == "NVIDIA_H100_80GB_HBM3.json"
        [entry] = [entry for entry in tuning.shipped(device) if entry.shape == shape]
        assert entry.measured[-1].tokens == 8192
    assert tuning.table_for(device, Shape(7168, 256, 256, 8, 512)) is None
    assert tuning.table_for("NVIDIA A100", SHAPE) is None


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"device": 3}')
    with pytest.raises(ServingError, match=r"x\.json is not a table"):
        tuning.read_table(tmp_path / "x.json")


def test_the_rules_tiles_are_about_as_high_as_an_expert_has_rows() -> None:
    assert tuning.rule(SHAPE, 1).direct
    heights = [tuning.rule(SHAPE, tokens).gate_up.block_m for tokens in (16, 256, 512, 1024)]
    assert heights == [16, 16, 32, 64]


def test_shapes_and_tokens_are_read_or_refused() -> None:
    assert parse_shape("7168,2048,32,8,256") == SHAPES["ep8"]
    assert parse_tokens("256,1,1") == (1, 256)
    for text in ("tp9", "7168,256", "7168,200,8,8"):
        with pytest.raises(ServingError):
            parse_shape(text)
    with pytest.raises(ServingError):
        parse_tokens("0,1")
