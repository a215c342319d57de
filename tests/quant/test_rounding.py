"""Each rounding method beats the one before it on the error it is meant to reduce."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.quant.absmax import round_absmax
from lightship.quant.gptq import inverse_cholesky, round_gptq
from lightship.quant.mse import round_mse
from lightship.quant.rounding import Int4Weight, relative_error, rounding_for
from lightship.recipe import Quantization
from lightship.w4afp8 import dequantize_int4, pack_int4

METHODS = ["absmax", "mse", "gptq"]


def random_weight(seed: int, rows: int = 64, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(seed: int, inputs: int = 256, tokens: int = 2048) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.linspace(0.05, 1, inputs)
    return torch.randn(tokens, inputs, generator=generator) @ mixing


def restored(rounded: Int4Weight) -> torch.Tensor:
    return dequantize_int4(pack_int4(rounded.q_OI), rounded.scale_OG)


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


def test_errors_on_gaussian_weights_are_those_of_the_literature() -> None:
    w_OI = random_weight(0, 512, 1024)
    assert relative_error(w_OI, round_absmax(w_OI)) == pytest.approx(0.0140, rel=0.03)
    assert relative_error(w_OI, round_mse(w_OI, signed=False)) == pytest.approx(0.0101, rel=0.03)
    assert relative_error(w_OI, round_mse(w_OI, signed=True)) == pytest.approx(0.0093, rel=0.03)


def test_signed_scales_use_the_minus_eight_end() -> None:
    w_OI = torch.zeros(1, 128)
    w_OI[0, 0], w_OI[0, 1] = 8.0, -7.0
    rounded = round_mse(w_OI, signed=True)
    assert rounded.scale_OG.item() < 0
    assert rounded.q_OI[0, :2].tolist() == [-8, 7]
    assert round_mse(w_OI, signed=False).scale_OG.item() > 0


@pytest.mark.parametrize("seed", range(3))
def test_gptq_makes_the_error_of_the_outputs_smaller_than_mse_rounding(seed: int) -> None:
    w_OI, x_TI = random_weight(seed), correlated_inputs(seed)
    y_TO = x_TI @ w_OI.T

    def output_error(rounded: Int4Weight) -> float:
        return float((x_TI @ restored(rounded).T - y_TO).square().sum() / y_TO.square().sum())

    assert output_error(round_gptq(w_OI, x_TI.T @ x_TI)) < 0.6 * output_error(round_mse(w_OI))


def test_gptq_without_a_hessian_is_mse_rounding() -> None:
    w_OI = random_weight(1)
    assert torch.equal(round_gptq(w_OI, None).q_OI, round_mse(w_OI).q_OI)


def test_gptq_against_uncorrelated_inputs_is_nearest_rounding() -> None:
    w_OI = random_weight(2)
    assert torch.equal(round_gptq(w_OI, torch.eye(256)).q_OI, round_mse(w_OI).q_OI)


def test_inputs_that_were_always_zero_do_not_break_the_factorization() -> None:
    x_TI = correlated_inputs(3)
    x_TI[:, 10:20] = 0
    upper_II = inverse_cholesky(x_TI.T @ x_TI, 0.01)
    assert upper_II.isfinite().all()
    assert (upper_II[10:20].triu(11) == 0).all(), "a dead input gives no compensation"
