"""Write a trained model in DeepSeek's released FP8 format, and read such a checkpoint back. Imported by train.py.

The format: float8_e4m3fn weights with one fp32 `weight_scale_inv` per 128 x 128 block (w = q * scale) for every linear
of attention, dense MLP, shared and routed experts; bf16 norms, embeddings, head and router; an fp32 router bias.
"""

from __future__ import annotations

import json
from pathlib import Path

import model as demo_model
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, DeepseekV3ForCausalLM

BLOCK = 128
E4M3_MAX = 448.0
SHARDS = 3
PLAIN = ("norm.weight", "embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")
BIAS = "e_score_correction_bias"


def quantize_fp8(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 weight [O, I] and fp32 scales [ceil(O/128), ceil(I/128)] of a weight."""
    rows, columns = w_OI.shape
    padded = torch.nn.functional.pad(w_OI.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / E4M3_MAX
    q = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(padded.shape)
    return q[:rows, :columns].contiguous(), scale


def dequantize_fp8(q_OI: Tensor, scale: Tensor) -> Tensor:
    """The fp32 weight that an FP8 weight and its block scales stand for."""
    wide = scale.repeat_interleave(BLOCK, 0)[: q_OI.shape[0]].repeat_interleave(BLOCK, 1)[:, : q_OI.shape[1]]
    return q_OI.float() * wide


def released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with one weight per expert projection, named as DeepSeek's releases name them."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                stem = name.replace("gate_up_proj", str(e))
                named[f"{stem}.gate_proj.weight"], named[f"{stem}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                named[f"{name.replace('down_proj', str(e))}.down_proj.weight"] = down
        else:
            named[name] = tensor
    return named


def release_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the released checkpoint, in layer order."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in released_names(state).items():
        if name.endswith(BIAS):
            tensors[name] = tensor.float()
        elif name.endswith(PLAIN):
            tensors[name] = tensor.bfloat16()
        else:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8(tensor)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def write_release(state: dict[str, Tensor], folder: Path) -> None:
    """Write shards, index, config.json and generation_config.json into the folder; the index is written last."""
    tensors = release_tensors(state)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    shards: list[dict[str, Tensor]] = [{}]
    written = 0
    for name, tensor in tensors.items():
        if written >= total * len(shards) / SHARDS:
            shards.append({})
        shards[-1][name] = tensor
        written += tensor.numel() * tensor.element_size()
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    config = demo_model.CONFIG | {"quantization_config": quantization | {"weight_block_size": [BLOCK, BLOCK]}}
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}
    for file, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def read_release(folder: Path) -> DeepseekV3ForCausalLM:
    """transformers' own model with the checkpoint's weights, dequantized to fp32."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = DeepseekV3ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    raw: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        raw |= load_file(file)
    named = {
        name: dequantize_fp8(t, raw[f"{name}_scale_inv"]) if f"{name}_scale_inv" in raw else t.float()
        for name, t in raw.items()
        if not name.endswith("_scale_inv")
    }
    model.load_state_dict(fused_names(named, config.n_routed_experts))
    return model.eval()


def fused_names(named: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """The inverse of `released_names`: the experts of a layer stacked as transformers 5 keeps them."""
    state = {name: tensor for name, tensor in named.items() if ".experts." not in name}
    for stem in {name.split(".experts.")[0] + ".experts" for name in named if ".experts." in name}:
        gate, up, down = (
            torch.stack([named[f"{stem}.{e}.{part}_proj.weight"] for e in range(experts)])
            for part in ("gate", "up", "down")
        )
        state[f"{stem}.gate_up_proj"], state[f"{stem}.down_proj"] = torch.cat([gate, up], 1), down
    return state


@torch.no_grad()
def round_experts_int4(model: DeepseekV3ForCausalLM) -> None:
    """Round the routed experts in place to int4 with plain absmax/7 scales per 128 inputs: the naive W4 baseline."""
    for layer in demo_model.moe_layers(model):
        for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
            groups = weight.view(*weight.shape[:-1], -1, BLOCK)
            scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-12)
            groups.copy_((groups / scale).round().clamp(-8, 7) * scale)
