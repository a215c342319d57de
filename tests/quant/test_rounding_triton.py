"""The GPU kernels do what the CPU does, shown on a CPU by Triton's interpreter where triton is installed."""

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("test_rounding_gpu.py compares the compiled kernels", allow_module_level=True)

from lightship.quant import gptq, gptq_triton, mse, mse_triton
from lightship.quant.descent import descend
from lightship.w4afp8 import GROUP, quantize_fp8_blocks
from tests.quant.test_rounding import correlated_inputs, random_weight


@pytest.mark.parametrize(("signed", "rows"), [(True, 136), (False, 20)])
def test_the_fused_kernel_gives_the_same_bytes_as_torch(signed: bool, rows: int) -> None:
    q_OI, scale_inv = quantize_fp8_blocks(random_weight(0, rows))
    q_OI[3] = 0
    packed, scale_OG = mse_triton.quantize_fp8_blocks(q_OI, scale_inv, signed=signed)
    expected_packed, expected_OG = mse.quantize_fp8_blocks_mse(q_OI, scale_inv, signed=signed)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(scale_OG, expected_OG)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_scales_of_float_weights_are_those_of_torch(weighted: bool) -> None:
    w_OI, weight_I = random_weight(1, 24), torch.rand(256) if weighted else None
    scale_OG = mse_triton.best_scales(w_OI, signed=True, weight_I=weight_I)
    assert torch.equal(scale_OG, mse.best_scales(w_OI, signed=True, weight_I=weight_I))


def test_columns_and_sweeps_are_those_of_torch() -> None:
    w_OI, x_TI = random_weight(2, 20), correlated_inputs(2)
    damped_II = gptq.damp(x_TI.T @ x_TI, 0.01)
    upper_II = gptq.inverse_cholesky(damped_II)
    scale_OG = mse.best_scales(w_OI, signed=True)
    group_I = torch.arange(256).flip(0) // GROUP
    q_OI = gptq.round_columns(w_OI, scale_OG, group_I, upper_II)
    kernel_OI = gptq_triton.round_columns(w_OI, scale_OG, group_I, upper_II)
    assert (q_OI == kernel_OI).float().mean() > 0.99
    w_OI, q_OI, scale_OG = w_OI[:4], q_OI[:4], scale_OG[:4]
    swept_OI = descend(w_OI, q_OI, scale_OG, group_I, damped_II.float(), 1)
    kernel_OI = gptq_triton.descend(w_OI, q_OI, scale_OG, group_I, damped_II.float(), 1)
    assert (swept_OI == kernel_OI).float().mean() > 0.99
    assert not torch.equal(swept_OI, q_OI)
