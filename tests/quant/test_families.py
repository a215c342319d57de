"""Every family that lightship declares, saved by transformers, goes from plan to a verified result that runs."""

from pathlib import Path

import pytest
import torch

from lightship.causal_lm import load_causal_lm
from lightship.quant.verify import verify
from lightship.recipe import CalibrationText, Method, Quantization
from tests.conftest import quantize_checkpoint
from tests.tiny import FAMILIES, write_checkpoint

LARGEST_DIVERGENCE = 0.1
"""Nats a token that int4 experts and, of a BF16 source, FP8 linears may move these random models."""
UNLIKE = 3
"""Times as far is a model with other weights."""


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_verified_and_runs(
    text: CalibrationText, tmp_path: Path, family: str, fp8: bool
) -> None:
    source, out = write_checkpoint(family, tmp_path / "source", fp8=fp8), tmp_path / "out"
    method: Method = "gptq" if fp8 else "mse"
    quantized = quantize_checkpoint(source, out, text, Quantization(method=method))
    assert quantized.experts == 8
    verification = verify(out, source)
    assert verification.passed, [check for check in verification.checks if not check.passed]
    ids = torch.randint(2, 258, (2, 64), generator=torch.Generator().manual_seed(0))
    before, after = (load_causal_lm(path)(ids).logits.log_softmax(-1) for path in (source, out))
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    shuffled = before.roll(1, dims=1)
    unlike = float((before.exp() * (before - shuffled)).sum(-1).mean())
    assert 0 < divergence < LARGEST_DIVERGENCE
    assert divergence * UNLIKE < unlike
