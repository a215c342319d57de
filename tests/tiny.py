"""Tiny random checkpoints in the released format: DeepSeek-V3's architecture, FP8 blocks, a byte tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightship.w4afp8 import quantize_fp8_blocks

SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 0,
}


def write_fp8_checkpoint(path: Path, *, seed: int = 0, shards: int = 2, mtp: bool = False, **sizes: Any) -> Path:
    """Write a random FP8 checkpoint of SIZES (any of them overridden) to `path`, in `shards` safetensors files.

    With `mtp`, a multi-token-prediction layer follows the last one, named as DeepSeek-V3 names it.
    """
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    path.mkdir(parents=True, exist_ok=True)
    config = SIZES | {"num_nextn_predict_layers": int(mtp)} | sizes
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(
        DeepseekV3Config(**config | {"num_nextn_predict_layers": 0}, initializer_range=0.05)
    )
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            for e, w_2IH in enumerate(tensor):
                gate, up = w_2IH.chunk(2)
                _put_fp8(tensors, f"{stem}.{e}.gate_proj.weight", gate)
                _put_fp8(tensors, f"{stem}.{e}.up_proj.weight", up)
        elif name.endswith("experts.down_proj"):
            for e, w_HI in enumerate(tensor):
                _put_fp8(tensors, f"{name.removesuffix('.down_proj')}.{e}.down_proj.weight", w_HI)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = torch.randn(tensor.shape) * 0.05
        elif name.endswith("gate.weight"):
            tensors[name] = torch.randn(tensor.shape).bfloat16() * config["hidden_size"] ** -0.5
        elif name.endswith("_proj.weight") or "proj_with_mqa" in name:
            _put_fp8(tensors, name, tensor)
        else:
            tensors[name] = tensor.bfloat16()
    if mtp:
        last, extra = f"model.layers.{config['num_hidden_layers'] - 1}.", f"model.layers.{config['num_hidden_layers']}."
        tensors |= {extra + n.removeprefix(last): t.clone() for n, t in tensors.items() if n.startswith(last)}
        _put_fp8(tensors, extra + "eh_proj.weight", torch.randn(config["hidden_size"], 2 * config["hidden_size"]))
        tensors |= {extra + n: torch.ones(config["hidden_size"]).bfloat16() for n in ("enorm.weight", "hnorm.weight")}
    names = sorted(tensors)
    weight_map = {
        n: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(names)
    }
    for shard in sorted(set(weight_map.values())):
        chosen = {n: tensors[n].contiguous() for n in names if weight_map[n] == shard}
        save_file(chosen, path / shard, metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write = lambda name, value: (path / name).write_text(json.dumps(value, indent=1))  # noqa: E731
    write("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write(
        "config.json",
        config
        | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "hidden_act": "silu",
            "rope_theta": 10000.0,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
        },
    )
    write_byte_tokenizer(path)
    return path


def write_byte_tokenizer(path: Path) -> None:
    """A tokenizer of the 256 bytes with <s> = 0 and </s> = 1, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    fast.save_pretrained(path)


def _put_fp8(tensors: dict[str, torch.Tensor], name: str, w_OI: torch.Tensor) -> None:
    tensors[name], tensors[name + "_scale_inv"] = quantize_fp8_blocks(w_OI)
