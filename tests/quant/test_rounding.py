"""Each rounding method beats the one before it on the error it is meant to reduce."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.quant import gptq
from lightship.quant.absmax import round_absmax
from lightship.quant.gptq import damp, inverse_cholesky, round_gptq
from lightship.quant.mse import best_scales, quantize_fp8_blocks_mse, round_mse
from lightship.quant.rounding import Int4Weight, output_error, relative_error, restore, rounding_for
from lightship.recipe import Quantization, Rule
from lightship.w4afp8 import GROUP, dequantize_fp8_blocks, dequantize_int4, pack_int4, quantize_fp8_blocks

METHODS = ["absmax", "mse", "gptq"]


def random_weight(seed: int, rows: int = 64, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(seed: int, inputs: int = 256, tokens: int = 2048) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.linspace(0.05, 1, inputs)
    return torch.randn(tokens, inputs, generator=generator) @ mixing


def restored(rounded: Int4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return dequantize_int4(pack_int4(rounded.q_OI), rounded.scale_OG, dtype)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), magnitude=st.sampled_from([1e-6, 1.0, 1e4]))
def test_any_weight_becomes_int4_with_bf16_scales(method: str, seed: int, magnitude: float) -> None:
    w_OI = random_weight(seed, 4) * magnitude
    w_OI[0] = 0
    w_OI[1, :128] = 0
    x_TI = correlated_inputs(seed, tokens=64)
    rounded = rounding_for(Quantization(method=method))(w_OI, x_TI.T @ x_TI)  # type: ignore[arg-type]
    assert rounded.q_OI.dtype == torch.int8
    assert rounded.scale_OG.dtype == torch.bfloat16
    assert rounded.q_OI.min() >= -8
    assert rounded.q_OI.max() <= 7
    assert rounded.scale_OG.isfinite().all()
    assert (restored(rounded)[0] == 0).all()
    assert relative_error(w_OI, rounded) < 0.05


@pytest.mark.parametrize(
    ("distribution", "absmax", "mse", "signed"),
    [
        (torch.distributions.Normal(0.0, 1.0), 0.0140, 0.0101, 0.0093),
        (torch.distributions.StudentT(5.0), 0.0297, 0.0217, 0.0195),
        (torch.distributions.Laplace(0.0, 1.0), 0.0259, 0.0191, 0.0173),
    ],
    ids=["Gaussian", "t5", "Laplace"],
)
def test_errors_on_weights_from_fp8_blocks_are_at_most_the_known_figures(
    distribution: torch.distributions.Distribution, absmax: float, mse: float, signed: float
) -> None:
    torch.manual_seed(0)
    w_OI = dequantize_fp8_blocks(*quantize_fp8_blocks(distribution.sample((1024, 1024))))
    assert relative_error(w_OI, round_absmax(w_OI)) == pytest.approx(absmax, rel=0.01)
    assert relative_error(w_OI, round_mse(w_OI, signed=False)) == pytest.approx(mse, rel=0.01)
    assert relative_error(w_OI, round_mse(w_OI, signed=True)) == pytest.approx(signed, rel=0.01)


def test_the_short_search_is_nearly_as_good_as_trying_every_divisor() -> None:
    w_OI = random_weight(5, 64, 512)
    amax_OG = w_OI.unflatten(-1, (-1, GROUP)).abs().amax(dim=-1)
    least_OG = torch.full_like(amax_OG, torch.inf)
    for divisor in torch.arange(6.8, 12.0, 0.1).tolist():
        for sign in (1, -1):
            scale_OG1 = (sign * amax_OG / divisor).bfloat16().float()[..., None]
            w_OGg = w_OI.unflatten(-1, (-1, GROUP))
            error_OGg = w_OGg - (w_OGg / scale_OG1).round().clamp(-8, 7) * scale_OG1
            least_OG = torch.minimum(least_OG, error_OGg.square().sum(dim=-1))
    short = float((w_OI - restore(round_mse(w_OI))).square().sum())
    assert short < 1.002 * float(least_OG.sum())


def test_weighted_scales_spend_the_error_where_it_counts_least() -> None:
    w_OI, weight_I = random_weight(6), torch.rand(256, generator=torch.Generator().manual_seed(6)) ** 4
    hessian_II = weight_I.diag()
    even, weighted = round_mse(w_OI), best_scales(w_OI, signed=True, weight_I=weight_I)
    q_OI = (w_OI / weighted.float().repeat_interleave(GROUP, dim=1)).round().clamp(-8, 7).to(torch.int8)
    assert output_error(w_OI, Int4Weight(q_OI, weighted), hessian_II) < 0.95 * output_error(w_OI, even, hessian_II)


@pytest.mark.parametrize("signed", [True, False])
def test_fp8_blocks_straight_to_int4_are_the_rounding_of_their_weights(signed: bool) -> None:
    q_OI, scale_inv = quantize_fp8_blocks(random_weight(7, 192))
    rounded = round_mse(dequantize_fp8_blocks(q_OI, scale_inv), signed=signed)
    packed, scale_OG = quantize_fp8_blocks_mse(q_OI, scale_inv, signed=signed)
    assert torch.equal(packed, pack_int4(rounded.q_OI))
    assert torch.equal(scale_OG, rounded.scale_OG)


def test_signed_scales_use_the_minus_eight_end() -> None:
    w_OI = torch.zeros(1, 128)
    w_OI[0, 0], w_OI[0, 1] = 8.0, -7.0
    rounded = round_mse(w_OI, signed=True)
    assert rounded.scale_OG.item() < 0
    assert rounded.q_OI[0, :2].tolist() == [-8, 7]
    assert round_mse(w_OI, signed=False).scale_OG.item() > 0


@pytest.mark.parametrize("seed", range(3))
def test_gptq_makes_the_error_of_unseen_outputs_smaller_than_mse_rounding(seed: int) -> None:
    w_OI, x_TI = random_weight(seed), correlated_inputs(seed, tokens=4096)
    seen_II, unseen_II = x_TI[:2048].T @ x_TI[:2048], x_TI[2048:].T @ x_TI[2048:]
    of_gptq = output_error(w_OI, round_gptq(w_OI, seen_II), unseen_II)
    assert of_gptq < 0.6 * output_error(w_OI, round_mse(w_OI), unseen_II)
    assert output_error(w_OI, round_gptq(w_OI, seen_II, sweeps=2), unseen_II) < of_gptq


def test_output_error_is_that_of_the_outputs() -> None:
    w_OI, x_TI = random_weight(4), correlated_inputs(4, tokens=512)
    rounded = round_mse(w_OI)
    y_TO = x_TI @ w_OI.T
    expected = float((x_TI @ restored(rounded).T - y_TO).square().sum() / y_TO.square().sum())
    assert output_error(w_OI, rounded, x_TI.T @ x_TI) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_replayed_is_what_the_written_tensors_stand_for(dtype: torch.dtype) -> None:
    rounded = round_mse(random_weight(8))
    assert torch.equal(restore(rounded, dtype), restored(rounded, dtype))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([8, 200, 2048]),
    magnitude=st.sampled_from([1e-4, 1.0, 1e3]),
    damping=st.sampled_from([0.001, 0.01, 0.3]),
)
def test_no_sweep_ever_makes_the_error_larger(seed: int, tokens: int, magnitude: float, damping: float) -> None:
    w_OI, x_TI = random_weight(seed, 8) * magnitude, correlated_inputs(seed, tokens=tokens)
    hessian_II = x_TI.T @ x_TI
    damped_II = damp(hessian_II, damping)

    def error(sweeps: int) -> float:
        error_OI = (w_OI - restore(round_gptq(w_OI, hessian_II, damping=damping, sweeps=sweeps))).double()
        return float(((error_OI @ damped_II) * error_OI).sum())

    errors = [error(sweeps) for sweeps in range(4)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors)), errors


def test_a_rule_reaches_the_method() -> None:
    w_OI, x_TI = random_weight(8), correlated_inputs(8)
    hessian_II = x_TI.T @ x_TI
    rule = Rule(layers=[0], damping=0.05, sweeps=3, signed_scales=False)
    expected = round_gptq(w_OI, hessian_II, signed=False, damping=0.05, sweeps=3)
    assert torch.equal(rounding_for(rule)(w_OI, hessian_II).q_OI, expected.q_OI)
    assert not torch.equal(round_gptq(w_OI, hessian_II, signed=False, damping=0.05).q_OI, expected.q_OI)


def test_stacked_weights_are_rounded_as_each_alone() -> None:
    gate_OI, up_OI, x_TI = random_weight(9), random_weight(10), correlated_inputs(9)
    both = round_gptq(torch.cat([gate_OI, up_OI]), x_TI.T @ x_TI)
    alone = round_gptq(up_OI, x_TI.T @ x_TI)
    assert (both.q_OI[64:] == alone.q_OI).float().mean() > 0.999
    assert torch.equal(both.scale_OG[64:], alone.scale_OG)


def test_gptq_without_a_hessian_is_mse_rounding() -> None:
    w_OI = random_weight(1)
    assert torch.equal(round_gptq(w_OI, None).q_OI, round_mse(w_OI).q_OI)


def test_gptq_against_uncorrelated_inputs_is_nearest_rounding() -> None:
    w_OI = random_weight(2)
    assert torch.equal(round_gptq(w_OI, torch.eye(256), sweeps=2).q_OI, round_mse(w_OI).q_OI)


def test_inputs_that_were_always_zero_do_not_break_the_factorization() -> None:
    x_TI = correlated_inputs(3)
    x_TI[:, 10:20] = 0
    upper_II = inverse_cholesky(damp(x_TI.T @ x_TI, 0.01))
    assert upper_II.isfinite().all()
    assert (upper_II[10:20].triu(11) == 0).all(), "a dead input gives no compensation"


@pytest.mark.parametrize("small", [32, 1024])
def test_the_factor_is_that_of_the_inverse_for_one_hessian_and_for_many(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "SMALL", small)
    x_TI = correlated_inputs(11, inputs=200)
    damped_EII = damp(torch.stack([x_TI.T @ x_TI, x_TI[:50].T @ x_TI[:50]]), 0.01)
    upper_EII = inverse_cholesky(damped_EII)
    for damped_II, upper_II in zip(damped_EII, upper_EII, strict=True):
        expected_II = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True).float()
        torch.testing.assert_close(upper_II, expected_II, rtol=1e-4, atol=1e-6 * float(expected_II.max()))
