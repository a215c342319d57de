"""lightship beside llm-compressor's GPTQ and ModelOpt's calibrate-and-round: one MoE layer, same weights, same tokens.

Each tool rounds the same experts to int4 in groups of 128 from the same calibration tokens, in a process and an
environment of its own, with two threads, one after another in turns. Compared are its time, its peak memory, and the
layer's output error on held-out tokens, which is computed here, by one function for all. Writes benchmarks/peers.json
and benchmarks/peers.md. The peers need environments of their own:

    python -m venv A && A/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python -m venv B && B/bin/pip install torch==2.13.0 nvidia-modelopt==0.47.0 requests huggingface_hub
    python benchmarks/peers.py --llmcompressor A/bin/python --modelopt B/bin/python
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peers_worker import PROJECTIONS, THREADS
from safetensors.torch import load_file, save_file

from lightship.checkpoint import Checkpoint
from lightship.eval.machine import describe_machine
from lightship.experts import FP8Experts, RoutedExperts, TensorParallel
from lightship.files import write_json, write_text
from lightship.recipe import load_recipe
from lightship.w4afp8 import GROUP, dequantize_fp8_blocks, quantize_fp8_blocks

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "demo" / "checkpoint"
DEMO_LAYER = "model.layers.2.mlp"
RUNS = 3
COMMAND = "python benchmarks/peers.py --llmcompressor A/bin/python --modelopt B/bin/python"
METHODS = [
    ("lightship", "gptq-sweeps", "GPTQ and two sweeps, signed scales"),
    ("lightship", "gptq", "GPTQ, signed scales"),
    ("lightship", "mse", "MSE grid, signed scales"),
    ("lightship", "absmax", "absmax/7"),
    ("llm-compressor", "gptq", "GPTQ as it comes"),
    ("llm-compressor", "gptq-mse", "GPTQ, scales of its MSE observer"),
    ("ModelOpt", "max", "max calibration, as it comes"),
    ("ModelOpt", "mse", "MSE calibration"),
    ("ModelOpt", "gptq", "GPTQ"),
]
ONCE = {("ModelOpt", "gptq")}
"""It rounds the whole matrix anew for each of its columns: minutes on a CPU, so it runs once."""


class FloatExperts(RoutedExperts):
    """The experts with unrounded activations, so that the rounding of the weights is all that differs."""

    def __init__(self, w13_E2IH: torch.Tensor, w2_EHI: torch.Tensor) -> None:
        super().__init__(TensorParallel(), torch.float32)
        self._expanded = w13_E2IH, w2_EHI

    def round_input(self, x_TH: torch.Tensor) -> torch.Tensor:
        return x_TH

    def round_intermediate(self, h_PI: torch.Tensor) -> torch.Tensor:
        return h_PI


@dataclass(frozen=True)
class Tokens:
    """Inputs of the layer [T, H], the experts chosen [T, K] and their weights [T, K]."""

    x_TH: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor


@dataclass(frozen=True)
class Case:
    """A layer of FP8 weights, expanded, with its calibration and its held-out tokens."""

    name: str
    w13_E2IH: torch.Tensor
    w2_EHI: torch.Tensor
    calibration: Tokens
    heldout: Tokens

    def save(self, path: Path) -> None:
        """For the workers, see `peers_worker`."""
        tensors = {"x": self.calibration.x_TH, "experts": self.calibration.experts_TK}
        for e, (w13_2IH, w2_HI) in enumerate(zip(self.w13_E2IH, self.w2_EHI, strict=True)):
            gate_IH, up_IH = w13_2IH.chunk(2)
            for projection, w_OI in zip(PROJECTIONS, (gate_IH, up_IH, w2_HI), strict=True):
                tensors[f"{e}.{projection}"] = w_OI.clone()
        save_file(tensors, path)

    def output(self, w13_E2IH: torch.Tensor, w2_EHI: torch.Tensor) -> torch.Tensor:
        """The layer's output [T, H] on the held-out tokens."""
        heldout = self.heldout
        with torch.inference_mode():
            return FloatExperts(w13_E2IH, w2_EHI)(heldout.x_TH, heldout.experts_TK, heldout.weights_TK)

    def output_error(self, path: Path) -> float:
        """||y' - y||² / ||y||² of a worker's weights on the held-out tokens."""
        tensors = load_file(path)
        experts = range(len(self.w2_EHI))
        for name in tensors:
            if name.endswith(".weight"):
                check_format(name, tensors[name], tensors[name.removesuffix("weight") + "scale"])
        w13 = [torch.cat([tensors[f"{e}.gate.weight"], tensors[f"{e}.up.weight"]]) for e in experts]
        w2 = [tensors[f"{e}.down.weight"] for e in experts]
        y_TH = self.output(self.w13_E2IH, self.w2_EHI)
        error_TH = self.output(torch.stack(w13), torch.stack(w2)) - y_TH
        return float(error_TH.square().sum() / y_TH.square().sum())


def check_format(name: str, w_OI: torch.Tensor, scale_OG: torch.Tensor) -> None:
    """Weights that are not int4 in groups of 128 are not compared."""
    q_OGg = w_OI.unflatten(-1, (-1, GROUP)) / scale_OG[..., None]
    assert q_OGg.min() > -8.01, name
    assert q_OGg.max() < 7.01, name
    assert (q_OGg - q_OGg.round()).abs().max() < 0.01, name


def demo_layer() -> Case:
    """The embedded model's last layer, and what it sees of the recipe's calibration and held-out text."""
    from lightship.causal_lm import load_causal_lm, load_tokenizer
    from lightship.text import read_scenes

    recipe = load_recipe(ROOT / "recipes" / "demo.toml")
    tokenizer, model = load_tokenizer(SOURCE), load_causal_lm(SOURCE)
    seen: list[tuple[torch.Tensor, ...]] = []
    model.get_submodule(f"{DEMO_LAYER}.experts").register_forward_pre_hook(lambda _, args: seen.append(args))

    def tokens(text: Any) -> Tokens:
        seen.clear()
        for sequences in read_scenes(text, tokenizer).values():
            for batch in torch.stack(sequences).split(8):
                model(batch, use_cache=False, logits_to_keep=1)
        return Tokens(*(torch.cat(parts).clone() for parts in zip(*seen, strict=True)))

    with torch.inference_mode():
        experts = FP8Experts.load(Checkpoint.open(SOURCE).reader(), DEMO_LAYER, TensorParallel())
        return Case(
            "the embedded model's last layer", *experts.expand(), tokens(recipe.calibration), tokens(recipe.fidelity)
        )


def random_layer(experts: int = 8, hidden: int = 2048, intermediate: int = 512, top: int = 2) -> Case:
    """DeepSeek-V3's proportions, reduced: heavy-tailed weights through FP8 blocks and correlated activations.

    Weights are Student's t with 5 degrees of freedom. The activations' covariance has eigenvalues 1 / i in a random
    basis, and channels of unequal size; a random router sends each token to `top` experts.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def weight(out_features: int, in_features: int) -> torch.Tensor:
        t_OI = randn(out_features, in_features) / (randn(5, out_features, in_features).square().mean(dim=0)).sqrt()
        return dequantize_fp8_blocks(*quantize_fp8_blocks(t_OI * in_features**-0.5))

    basis_HH = torch.linalg.qr(randn(hidden, hidden)).Q
    mix_HH = torch.arange(1, hidden + 1).rsqrt()[:, None] * basis_HH * (0.5 * randn(hidden)).exp()
    router_HE = randn(hidden, experts)

    def tokens(count: int) -> Tokens:
        x_TH = randn(count, hidden) @ mix_HH
        x_TH /= x_TH.square().mean(dim=1, keepdim=True).sqrt()
        logits_TK, experts_TK = (x_TH @ router_HE / hidden**0.5).topk(top, dim=1)
        return Tokens(x_TH, experts_TK, logits_TK.softmax(dim=1))

    w13_E2IH = torch.stack([weight(2 * intermediate, hidden) for _ in range(experts)])
    w2_EHI = torch.stack([weight(hidden, intermediate) for _ in range(experts)])
    name = f"{experts} random experts of {hidden} x {intermediate}"
    return Case(name, w13_E2IH, w2_EHI, tokens(4096 * experts // top), tokens(4096))


def main() -> None:
    """Run every tool on both layers and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", required=True, help="the Python of an environment that has llm-compressor")
    parser.add_argument("--modelopt", required=True, help="the Python of an environment that has ModelOpt")
    arguments = parser.parse_args()
    pythons = {"lightship": sys.executable, "llm-compressor": arguments.llmcompressor, "ModelOpt": arguments.modelopt}
    layers, versions = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for case in (demo_layer(), random_layer()):
            file = Path(folder) / "case.safetensors"
            case.save(file)
            costs: dict[tuple[str, str], list[dict[str, Any]]] = {(tool, method): [] for tool, method, _ in METHODS}
            errors = {}
            for turn in range(RUNS):
                for tool, method in costs:
                    if turn and (tool, method) in ONCE:
                        continue
                    out = Path(folder) / f"{tool}-{method}.safetensors"
                    cost = run_worker(pythons[tool], tool, file, out, method)
                    costs[tool, method].append(cost)
                    versions[tool] = cost["versions"]
                    if not turn:
                        errors[tool, method] = case.output_error(out)
                    out.unlink()
                    print(f"{case.name}: {tool}, {method}: {cost['seconds']:.2f} s, error {errors[tool, method]:.3%}")
            rows = [row(tool, name, errors[tool, method], costs[tool, method]) for tool, method, name in METHODS]
            seen = (case.calibration.experts_TK.flatten().bincount()).tolist()
            layers.append(
                {
                    "layer": case.name,
                    "experts": len(seen),
                    "hidden_size": case.w2_EHI.shape[1],
                    "moe_intermediate_size": case.w2_EHI.shape[2],
                    "calibration_tokens_of_experts": seen,
                    "heldout_tokens": len(case.heldout.x_TH),
                    "tools": rows,
                }
            )
    result = {
        "command": COMMAND,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "threads": THREADS,
        "versions": versions,
        "layers": layers,
    }
    write_json(ROOT / "benchmarks" / "peers.json", result)
    write_text(ROOT / "benchmarks" / "peers.md", markdown(result))
    print(markdown(result))


def run_worker(python: str, tool: str, case: Path, out: Path, method: str) -> dict[str, Any]:
    """Run a tool's worker and read its costs."""
    worker = Path(__file__).with_name(f"peers_{tool.replace('-', '').lower()}.py")
    environment = os.environ | {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(THREADS),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, str(worker), str(case), str(out), method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool}'s worker failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(tool: str, name: str, error: float, costs: list[dict[str, Any]]) -> dict[str, Any]:
    """One tool's figures: the best time and the largest peak of its runs."""
    return {
        "tool": tool,
        "method": name,
        "output_error": error,
        "seconds": min(c["seconds"] for c in costs),
        "cpu_seconds": min(c["cpu_seconds"] for c in costs),
        "peak_bytes": max(c["peak_bytes"] for c in costs),
        "runs": len(costs),
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    parts = [
        "# lightship beside llm-compressor and ModelOpt\n\n"
        f"`{result['command']}`, {result['date']}, {result['machine']}, {result['threads']} threads.\n\n"
        + "".join(
            f"- {tool}: {', '.join(f'{name} {number}' for name, number in versions.items())}\n"
            for tool, versions in result["versions"].items()
        )
        + "\nOne MoE layer; the same FP8 weights, expanded to float32, and the same calibration tokens for all. Every\n"
        "result is checked to be int4 in groups of 128. Output error is the relative squared error of the layer's\n"
        "output against the FP8 layer's, on held-out tokens, with float32 activations. Time is calibration and\n"
        "rounding, the best run of those given; memory is the peak above what was resident with the layer and its\n"
        "tokens loaded, the largest of the runs. The peers keep float32 scales here; lightship's are bf16, as SGLang\n"
        "reads them. absmax/7 and max calibration are the same rounding but for that: weights that come from FP8\n"
        "often lie half-way between two steps, so that a scale 0.1 % off moves the output error by some per cent.\n"
        "lightship's absmax and MSE read no tokens; ModelOpt's calibration runs the layer on them, as users run it.\n"
        "Times and memory are a CPU's and say nothing about a GPU.\n"
    ]
    for layer in result["layers"]:
        tokens, title = layer["calibration_tokens_of_experts"], layer["layer"]
        lines = [["tool", "method", "output error", "time, s", "processor, s", "peak memory, MB", "runs"], ["---"] * 7]
        for r in layer["tools"]:
            times = [f"{r['seconds']:.2f}", f"{r['cpu_seconds']:.2f}", f"{r['peak_bytes'] / 1e6:.0f}", str(r["runs"])]
            lines.append([r["tool"], r["method"], f"{r['output_error']:.3%}", *times])
        parts.append(
            f"## {title[0].upper()}{title[1:]}\n\n{layer['experts']} experts, hidden size {layer['hidden_size']}, "
            f"intermediate size {layer['moe_intermediate_size']}; {min(tokens)} to {max(tokens)} calibration tokens an "
            f"expert, {layer['heldout_tokens']} held-out tokens.\n\n"
            + "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
            + "\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
