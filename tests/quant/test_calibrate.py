"""Calibration records what the experts really see."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightship.causal_lm import load_causal_lm, load_tokenizer, routed_experts
from lightship.checkpoint import Checkpoint
from lightship.errors import CheckpointError, LightshipError
from lightship.quant.calibrate import HESSIANS, calibrate, check_memory, input_scale, needed_memory
from lightship.recipe import CalibrationText, TextSource
from lightship.records import Calibration
from lightship.text import read_sequences
from tests.conftest import unseen, write_lines

LAYER = "model.layers.1.mlp"


def test_every_token_is_counted_once_for_each_expert_it_chose(calibrated: tuple[Calibration, Path]) -> None:
    (layer,) = calibrated[0].layers
    assert calibrated[0].tokens == {"prose": 2048, "code": 2048}
    for scene, tokens in calibrated[0].tokens.items():
        assert sum(layer.expert_tokens[scene]) == 2 * tokens


def test_statistics_equal_those_of_a_direct_forward(
    fp8: Path, text: CalibrationText, calibrated: tuple[Calibration, Path]
) -> None:
    model, tokenizer = load_causal_lm(fp8), load_tokenizer(fp8)
    seen: dict[int, list[torch.Tensor]] = {}
    amax = [0.0]

    def observe(expert: int, x_tH: torch.Tensor, h_tI: torch.Tensor) -> None:
        seen.setdefault(expert, []).append(x_tH)
        amax[0] = max(amax[0], float(h_tI.abs().max()))

    routed_experts(model)[LAYER].observer = observe
    for source in text.sources:
        for sequence in read_sequences(source, tokenizer, text.tokens_per_scene, text.sequence_tokens):
            model(sequence[None])
    (layer,) = calibrated[0].layers
    assert layer.tokens_of_experts() == [sum(map(len, seen.get(e, []))) for e in range(8)]
    assert layer.w2_amax == pytest.approx(amax[0], rel=1e-3)
    x_TH = torch.cat(seen[3])
    torch.testing.assert_close(
        load_file(calibrated[1] / HESSIANS)[f"{LAYER}.3.w13"], x_TH.T @ x_TH, rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("amax", [1e-5, 0.3, 7.0, 448.0, 1234.5])
def test_an_input_scale_is_the_least_bf16_number_that_does_not_saturate(amax: float) -> None:
    scale = input_scale(amax)
    assert scale == float(torch.tensor(scale).bfloat16())
    below = float(torch.nextafter(torch.tensor(scale, dtype=torch.bfloat16), torch.tensor(0.0, dtype=torch.bfloat16)))
    assert below < amax / 448 <= scale


def test_a_model_that_memory_cannot_hold_is_refused_with_both_figures(fp8: Path) -> None:
    checkpoint = Checkpoint.open(fp8)
    needed = needed_memory(checkpoint)
    check_memory(checkpoint, needed)
    with pytest.raises(CheckpointError, match=r"needs about \d.* of memory, 1 MB is free"):
        check_memory(checkpoint, 1_000_000)


def test_text_that_is_too_short_is_named(fp8: Path, tmp_path: Path) -> None:
    short = write_lines(tmp_path / "short.jsonl", ["brief"])
    text = CalibrationText(sources=[TextSource(scene="s", path=str(short))])
    with pytest.raises(LightshipError, match=r"short\.jsonl holds 6 tokens, fewer than one sequence of 512"):
        calibrate(fp8, text, tmp_path, unseen)


def test_a_missing_text_is_named_with_its_scene(fp8: Path, tmp_path: Path) -> None:
    text = CalibrationText(sources=[TextSource(scene="chinese", path=str(tmp_path / "absent.jsonl"))])
    with pytest.raises(LightshipError, match=r"text of scene 'chinese' is missing: .*absent\.jsonl"):
        calibrate(fp8, text, tmp_path, unseen)
