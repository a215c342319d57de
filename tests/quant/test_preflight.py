"""The preflight says before the work whether it can succeed, what it takes, and what comes out."""

import json
import time
from pathlib import Path

import msgspec
import pytest
from benchmarks.terminus_plan import KIMI_K2, TERMINUS, write_headers

from lightship.checkpoint import Checkpoint
from lightship.files import read_json
from lightship.quant.preflight import preflight
from lightship.quant.quantize import CALIBRATION
from lightship.recipe import CalibrationText, Quantization
from lightship.records import Calibration, Preflight
from tests.conftest import quantize_checkpoint
from tests.tiny import FAMILIES, write_checkpoint


def look(path: Path, out: Path | None = None, seconds: float = 0) -> Preflight:
    return preflight(Checkpoint.open(path), Quantization(), None, out, probe_seconds=seconds, device="cpu")


@pytest.fixture(scope="module")
def terminus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3.1-Terminus's true shapes, seven layers of it, headers alone."""
    return write_headers(tmp_path_factory.mktemp("terminus"), TERMINUS | {"num_hidden_layers": 7}, 20)


def test_deepseek_shrinks_as_its_experts_do(terminus: Path) -> None:
    start = time.monotonic()
    found = look(terminus)
    assert time.monotonic() - start < 10
    experts = next(part for part in found.parts if part.part == "routed experts")
    weights = (4 + 1) * 256 * 3 * 7168 * 2048
    assert experts.bytes_before == pytest.approx(weights * (1 + 4 / 128**2), rel=1e-6)
    assert experts.bytes_after == pytest.approx(weights * (1 / 2 + 2 / 128), rel=1e-6)
    assert found.bytes_after - experts.bytes_after == found.bytes_before - experts.bytes_before


def test_deepseek_divides_up_to_16_and_kimi_too(terminus: Path, tmp_path: Path) -> None:
    assert look(terminus).tensor_parallel == [1, 2, 4, 8, 16]
    kimi = look(write_headers(tmp_path, KIMI_K2 | {"num_hidden_layers": 2}, 3))
    assert kimi.tensor_parallel == [1, 2, 4, 8, 16]
    assert "18432 / 32 = 576 is no multiple of 128" in " ".join(kimi.degrees[-1].obstacles["dense MLP"])


def test_every_gpu_holds_the_latent_cache_of_every_token(terminus: Path) -> None:
    fit = look(terminus).fits[0]
    assert fit.cache_bytes_per_token == 7 * 576 * 2
    assert fit.cache_tokens == fit.room // fit.cache_bytes_per_token


def test_weights_a_gpu_are_its_share_and_what_is_not_divided(terminus: Path) -> None:
    found = preflight(Checkpoint.open(terminus), Quantization(), probe_seconds=0, device="cpu", tensors=True)
    undivided = ("q_a_proj", "kv_a_proj", "mlp.gate.", "norm", "eh_proj")
    whole = sum(t.bytes_after for t in found.planned if any(name in t.name for name in undivided))
    assert found.fits[0].weight_bytes == pytest.approx(whole + (found.bytes_after - whole) / 8, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured(family: str, tmp_path: Path) -> None:
    found = look(write_checkpoint(family, tmp_path / "tiny", fp8=False), seconds=1)
    assert found.probe
    assert found.seconds == pytest.approx(
        max(sum(d.seconds for d in found.durations[:2]), sum(d.seconds for d in found.durations[2:]))
    )
    assert "become FP8 128x128 blocks" in " ".join(found.notes)
    assert found.problems == []


def test_calibration_tokens_are_those_that_the_quantization_will_read(
    fp8: Path, text: CalibrationText, tmp_path: Path
) -> None:
    prose, code = text.sources
    sources = [msgspec.structs.replace(prose, weight=0.25), msgspec.structs.replace(prose, weight=0.5), code]
    text = msgspec.structs.replace(text, sources=sources, tokens_per_scene=4000)
    found = preflight(Checkpoint.open(fp8), Quantization(), text, probe_seconds=0, device="cpu")
    quantize_checkpoint(fp8, tmp_path / "out", text, Quantization(method="absmax"))
    used = read_json(tmp_path / "out" / CALIBRATION, Calibration).tokens
    assert found.calibration_tokens == used == {"prose": 3 * 256 + 7 * 256, "code": 13 * 256}
    assert f"the experts' sums of {sum(used.values()):,} tokens" in found.needs[0].arithmetic
    assert "the calibration text gives 5,888 of the 6,400 tokens" in " ".join(found.notes)
    assert "code 3,328 of 3,840; add text" in " ".join(found.notes), "prose has enough"


def test_finished_experts_are_counted_and_a_torn_line_is_not(fp8: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    units = ["model", *(f"model.layers.1.mlp.experts.{e}" for e in range(3))]
    lines = "".join(json.dumps({"unit": unit, "record": None}) + "\n" for unit in units)
    (work / "journal-a.jsonl").write_text(lines + '{"unit": "model.layers.1.mlp.exp')
    found = look(fp8, tmp_path / "out")
    assert (found.experts_done, found.experts) == (3, 8)


@pytest.mark.parametrize(
    ("what", "patched", "value"),
    [
        ("memory", "lightship.quant.preflight.free_memory", lambda: 1000),
        ("disk at", "shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})),
    ],
)
def test_too_little_is_a_problem_that_says_what_to_change(
    what: str, patched: str, value: object, fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patched, value)
    (problem,) = look(fp8, tmp_path / "out").problems
    assert problem.startswith(what)
    assert "0.00 GB is there: " in problem
