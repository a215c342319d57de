"""SGLang's own W4AFP8 and FP8 block MoE layers, as engines of `moe_kernel`. Written for SGLang 0.5.17."""

import functools
import glob
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.moe_kernel import ERROR_TOKENS, Case, Results, relative_error, static_scales

from lightship.serving.moe.timing import Tokens, median_us, random_inputs, random_layer
from lightship.serving.moe.tuning import Shape
from lightship.w4afp8 import FP8_MAX, dequantize_int4, quantize_fp8_blocks
from tests.serving.moe_reference import reference


def start(checkpoint: Path) -> dict[str, Any]:
    """Set what SGLang expects of a server around a layer; its version."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import get_context
    from sglang.srt.server_args import ServerArgs

    get_context().set_server_args(
        ServerArgs(
            model_path=str(checkpoint),
            tp_size=1,
            attention_backend="triton",
            sampling_backend="pytorch",
            grammar_backend="none",
            mem_fraction_static=0.5,
        )
    )
    parallel_state.init_distributed_environment(
        world_size=1, rank=0, local_rank=0, distributed_init_method="tcp://127.0.0.1:29511", backend="nccl"
    )
    parallel_state.initialize_model_parallel(1)
    return {"version": version("sglang")}


class W4AFP8:
    """`cutlass_w4a8_moe`, static activation scales. Absent experts are E there."""

    def __init__(self, shape: Shape, weights: dict[str, torch.Tensor]) -> None:
        from sglang.srt.layers.quantization.w4afp8 import interleave_scales

        experts, inter, hidden = shape.experts, shape.intermediate, shape.hidden
        self.experts, self.w13, self.w2 = experts, weights["w13"].clone(), weights["w2"].clone()
        self.s13, self.s2 = (interleave_scales(weights[f"{w}_scale"]) for w in ("w13", "w2"))

        def stride(number: int) -> torch.Tensor:
            return torch.full((experts, 3), number, device="cuda", dtype=torch.int64)

        self.a13, self.c13, self.a2, self.c2 = stride(hidden), stride(2 * inter), stride(inter), stride(hidden)
        self.offsets = torch.empty(experts + 1, dtype=torch.int32, device="cuda")
        self.sizes = [torch.empty(experts, 3, dtype=torch.int32, device="cuda") for _ in range(2)]
        self.scales = (torch.tensor([5 / FP8_MAX], device="cuda"), torch.tensor([8 / FP8_MAX], device="cuda"))

    def __call__(self, given: Tokens) -> torch.Tensor:
        from sglang.srt.layers.moe.cutlass_w4a8_moe import cutlass_w4a8_moe

        x_TH, experts_TK, weights_TK = given
        return cutlass_w4a8_moe(
            x_TH, self.w13, self.w2, self.s13, self.s2, weights_TK, experts_TK, self.a13, self.a13, self.c13, self.a2,
            self.a2, self.c2, self.c13, self.c2, self.offsets, *self.sizes, *self.scales,
        )  # fmt: skip

    def adapt(self, given: Tokens) -> Tokens:
        x_TH, experts_TK, weights_TK = given
        return x_TH, torch.where(experts_TK < 0, self.experts, experts_TK), weights_TK


class FP8:
    """`fused_experts` on the same weights as FP8 blocks."""

    def __init__(self, shape: Shape, weights: dict[str, torch.Tensor]) -> None:
        from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig

        made: dict[str, list[torch.Tensor]] = {"w13": [], "w2": []}
        scales: dict[str, list[torch.Tensor]] = {"w13": [], "w2": []}
        for name in made:
            for packed, scale in zip(weights[name], weights[f"{name}_scale"], strict=True):
                q, s = quantize_fp8_blocks(dequantize_int4(packed, scale))
                made[name].append(q)
                scales[name].append(s)
        self.w13, self.w2 = torch.stack(made["w13"]), torch.stack(made["w2"])
        self.s13, self.s2 = torch.stack(scales["w13"]), torch.stack(scales["w2"])
        self.config = MoeRunnerConfig(
            num_experts=shape.total,
            num_local_experts=shape.experts,
            hidden_size=shape.hidden,
            intermediate_size_per_partition=shape.intermediate,
            top_k=shape.top_k,
            activation="silu",
            inplace=False,
        )

    def __call__(self, given: Tokens) -> torch.Tensor:
        from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        x_TH, experts_TK, weights_TK = given
        return fused_experts(
            x_TH, self.w13, self.w2, StandardTopKOutput(weights_TK, experts_TK, None), self.config, use_fp8_w8a8=True,
            w1_scale=self.s13, w2_scale=self.s2, block_shape=[128, 128],
        )  # fmt: skip


def fp8_candidates(tokens: int) -> dict[str, dict[str, int]]:
    """Configurations of SGLang's Triton kernel, and the one that it ships for an H800 and this shard."""
    import sglang.srt.layers.moe.moe_runner.triton_utils as triton_utils

    keys = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    tried = [
        (16, 128, 128, 1, 4, 4), (16, 64, 128, 1, 4, 5), (16, 128, 128, 32, 4, 3), (32, 128, 128, 1, 4, 4),
        (64, 128, 128, 1, 4, 4), (64, 128, 128, 32, 4, 3), (64, 128, 128, 16, 8, 4), (64, 256, 128, 16, 8, 3),
        (128, 128, 128, 16, 8, 3), (128, 128, 128, 32, 4, 3), (128, 256, 128, 16, 8, 3),
    ]  # fmt: skip
    found = {str(t): dict(zip(keys, t, strict=True)) for t in tried}
    found = {
        name: c
        for name, c in found.items()
        if not (tokens >= 1024 and c["BLOCK_SIZE_M"] < 64) and not (tokens <= 16 and c["BLOCK_SIZE_M"] > 64)
    }
    pattern = "/configs/*/E=256,N=256,device_name=NVIDIA_H800,dtype=fp8_w8a8,block_shape=[[]128, 128].json"
    for file in glob.glob(os.path.dirname(triton_utils.__file__) + pattern):
        table = json.loads(Path(file).read_text())
        found["H800"] = table[min(table, key=lambda key: abs(int(key) - tokens))]
    return found


def engines(shape: Shape, weights: dict[str, torch.Tensor]) -> dict[str, Callable[[list[Tokens]], dict[str, Any]]]:
    """What `moe_kernel` times beside its own layer; layers are made when they are first timed."""
    w4_of, fp8_of = functools.cache(lambda: W4AFP8(shape, weights)), functools.cache(lambda: FP8(shape, weights))

    def time_w4(inputs: list[Tokens]) -> dict[str, Any]:
        w4 = w4_of()
        return {"us": round(median_us(w4, [w4.adapt(i) for i in inputs]), 2)}

    def time_fp8(inputs: list[Tokens]) -> dict[str, Any]:
        return {"us": round(median_us(fp8_of(), inputs), 2)}

    def time_tuned(inputs: list[Tokens]) -> dict[str, Any]:
        from sglang.srt.layers.moe.moe_runner.triton_utils import override_config

        measured: dict[str, float] = {}
        for name, config in fp8_candidates(len(inputs[0][0])).items():
            try:
                with override_config(config):
                    measured[name] = round(median_us(fp8_of(), inputs, replays=10), 2)
            except Exception as error:
                print("failed:", name, repr(error)[:120], flush=True)
        best = min(measured, key=lambda name: measured[name])
        return {"us": measured[best], "configuration": best, "tried": measured}

    return {"sglang W4AFP8": time_w4, "sglang FP8": time_fp8, "sglang FP8 tuned": time_tuned}


def error(engine: str, case: Case, results: Results) -> None:
    """SGLang's relative error on the weights and inputs of `moe_kernel.errors`."""
    if engine not in ("sglang W4AFP8", "sglang FP8"):
        return

    def measure() -> dict[str, Any]:
        weights = random_layer(case.shape)
        (given,) = random_inputs(case.shape, ERROR_TOKENS, 1, seed=7)
        want = reference(weights, *given, rounding="none")
        if engine == "sglang FP8":
            return {"relative_error": relative_error(FP8(case.shape, weights)(given), want)}
        layer = W4AFP8(case.shape, weights)
        first, second = static_scales(weights, given)
        layer.scales = (first.reshape(1), second.reshape(1))
        return {"relative_error": relative_error(layer(layer.adapt(given)), want)}

    results.measure({"shape": case.name, "M": ERROR_TOKENS, "engine": engine}, measure)
