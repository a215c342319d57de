"""On a GPU every rounding method gives what the CPU gives, to within rounding; and how long it takes at true shapes.

pytest -m gpu -s tests/quant/test_rounding_gpu.py
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from lightship.quant import gptq
from lightship.quant.descent import descend
from lightship.quant.mse import best_scales, quantize_fp8_blocks_mse
from lightship.quant.rounding import Int4Weight, output_error, relative_error, restore, rounding_for, runs_triton
from lightship.recipe import Quantization
from lightship.w4afp8 import GROUP, quantize_fp8_blocks, unpack_int4
from tests.quant.test_rounding import correlated_inputs, random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

W13, W2 = (4096, 7168), (7168, 2048)
"""Gate and up stacked, and down, of one expert of DeepSeek-V3."""


def milliseconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median time on the GPU, after one run that compiles."""
    work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def test_triton_is_used() -> None:
    assert runs_triton(torch.zeros(1, device="cuda"))


@pytest.mark.parametrize("settings", [
    Quantization(method="absmax"),
    Quantization(method="mse"),
    Quantization(method="mse", signed_scales=False),
    Quantization(method="gptq"),
    Quantization(method="gptq", sweeps=2),
], ids=lambda s: f"{s.method}-{s.signed_scales}-{s.sweeps}")  # fmt: skip
def test_a_method_gives_the_same_on_both_devices(settings: Quantization) -> None:
    w_OI, x_TI = random_weight(0, 200, 512), correlated_inputs(0, inputs=512)
    hessian_II = x_TI.T @ x_TI
    method = rounding_for(settings)
    on_cpu = method(w_OI, hessian_II)
    on_gpu = method(w_OI.cuda(), hessian_II.cuda())
    assert on_gpu.q_OI.is_cuda
    assert on_gpu.scale_OG.is_cuda
    on_gpu = Int4Weight(on_gpu.q_OI.cpu(), on_gpu.scale_OG.cpu())
    same = float((on_cpu.q_OI == on_gpu.q_OI).float().mean())
    scales = float((on_cpu.scale_OG == on_gpu.scale_OG).float().mean())
    print(f"\n{settings.method}: {same:.4%} of int4 and {scales:.4%} of scales are equal")
    assert scales > 0.99
    assert same > (0.95 if settings.method == "gptq" else 0.99)
    assert relative_error(w_OI, on_gpu) == pytest.approx(relative_error(w_OI, on_cpu), rel=0.01)
    assert output_error(w_OI, on_gpu, hessian_II) == pytest.approx(output_error(w_OI, on_cpu, hessian_II), rel=0.01)


@pytest.mark.parametrize("signed", [True, False])
def test_fp8_blocks_to_int4_are_those_of_the_cpu(signed: bool) -> None:
    q_OI, scale_inv = quantize_fp8_blocks(random_weight(1, 1000, 2048))
    packed, scale_OG = quantize_fp8_blocks_mse(q_OI, scale_inv, signed=signed)
    packed_gpu, scale_gpu = (t.cpu() for t in quantize_fp8_blocks_mse(q_OI.cuda(), scale_inv.cuda(), signed=signed))
    differing = int((scale_OG != scale_gpu).sum())
    print(f"\n{differing} of {scale_OG.numel()} scales differ")
    assert differing <= scale_OG.numel() * 1e-3
    same_OG = scale_OG == scale_gpu
    q_OGg, gpu_OGg = (unpack_int4(p).unflatten(-1, (-1, GROUP)) for p in (packed, packed_gpu))
    assert torch.equal(q_OGg[same_OG], gpu_OGg[same_OG])


def test_no_sweep_makes_the_error_larger_on_a_gpu() -> None:
    w_OI, x_TI = random_weight(3, 256, 1024).cuda(), correlated_inputs(3, inputs=1024).cuda()
    hessian_II = x_TI.T @ x_TI
    damped_II = gptq.damp(hessian_II, 0.01)
    errors = []
    for sweeps in range(4):
        error_OI = (w_OI - restore(gptq.round_gptq(w_OI, hessian_II, sweeps=sweeps))).double()
        errors.append(float(((error_OI @ damped_II) * error_OI).sum()))
    print(f"\nerrors after 0 to 3 sweeps: {errors}")
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))


@pytest.mark.parametrize("shape", [W13, W2], ids=["w13", "w2"])
def test_times_at_the_true_shape(shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    torch.manual_seed(0)
    w_OI = torch.randn(outputs, inputs, device="cuda") * 0.02
    q_OI, scale_inv = quantize_fp8_blocks(w_OI)
    x_TI = torch.randn(4096, inputs, device="cuda") * torch.linspace(0.05, 1, inputs, device="cuda")
    hessian_II = x_TI.T @ x_TI
    damped_II = gptq.damp(hessian_II, 0.01)
    upper_II = gptq.inverse_cholesky(damped_II)
    scale_OG = best_scales(w_OI, signed=True)
    group_I = torch.arange(inputs, device="cuda") // GROUP
    rounded_OI = gptq.round_columns(w_OI, scale_OG, group_I, upper_II)
    damped_float_II = damped_II.float()
    steps = {
        "fp8 blocks -> int4, mse": lambda: quantize_fp8_blocks_mse(q_OI, scale_inv),
        "best scales": lambda: best_scales(w_OI, signed=True),
        "best scales, weighted": lambda: best_scales(w_OI, signed=True, weight_I=hessian_II.diagonal()),
        "damp": lambda: gptq.damp(hessian_II, 0.01),
        "inverse Cholesky": lambda: gptq.inverse_cholesky(damped_II),
        "GPTQ columns": lambda: gptq.round_columns(w_OI, scale_OG, group_I, upper_II),
        "one sweep": lambda: descend(w_OI, rounded_OI, scale_OG, group_I, damped_float_II, 1),
        "GPTQ, all of it": lambda: gptq.round_gptq(w_OI, hessian_II),
        "output error": lambda: output_error(w_OI, Int4Weight(rounded_OI, scale_OG), hessian_II),
    }
    print(f"\n{torch.cuda.get_device_name()}, {outputs} x {inputs}, milliseconds:")
    for name, work in steps.items():
        print(f"  {name:26} {milliseconds(work):9.3f}")
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"  peak memory {peak:.2f} GiB")
