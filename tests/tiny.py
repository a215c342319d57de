"""Tiny random checkpoints in the released format, of every family, with FP8 blocks or BF16, and a byte tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lightship.architecture import architecture_of
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

FP8_BLOCKS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}

COMMON = {
    "vocab_size": 258,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHARED = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": COMMON | SHARED | LATENT | {"q_lora_rank": 128, "n_group": 2, "topk_group": 1},
    "kimi_k2": COMMON | SHARED | LATENT | {"q_lora_rank": 128, "n_group": 1, "topk_group": 1},
    "deepseek_v2": COMMON | SHARED | LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "qwen3_moe": COMMON | {"num_experts": 8, "mlp_only_layers": [0], "head_dim": 128, "norm_topk_prob": True},
    "glm4_moe": COMMON | SHARED | {"head_dim": 128, "use_qk_norm": True, "attention_bias": True, "n_group": 1},
}
"""Model type -> sizes of its tiny checkpoint: a dense layer, then one with experts."""
TRANSFORMERS_CLASSES = {
    "deepseek_v3": "DeepseekV3Config",
    "kimi_k2": "DeepseekV3Config",
    "deepseek_v2": "DeepseekV2Config",
    "qwen3_moe": "Qwen3MoeConfig",
    "glm4_moe": "Glm4MoeConfig",
}


def write_checkpoint(
    family: str, path: Path, *, fp8: bool, mtp: bool = False, seed: int = 0, shards: int = 2, **sizes: Any
) -> Path:
    """Write a random checkpoint of FAMILIES (sizes overridden) to `path`, made and saved by transformers, in BF16.

    With `fp8`, linears then become FP8 blocks, as DeepSeek releases them. With `mtp`, an MTP layer follows, which
    transformers does not save.
    """
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, TRANSFORMERS_CLASSES[family])(**FAMILIES[family] | sizes)
    config.num_mtp_layers = int(mtp)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        # As released: without this, every expert would be as likely as any other, or one never chosen.
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.05)
        elif name.endswith("mlp.gate.weight"):
            tensor.normal_(std=config.hidden_size**-0.5)
        elif name.endswith("bias"):
            tensor.normal_(std=0.02)
    model.save_pretrained(path)
    saved = json.loads((path / "config.json").read_text()) | {"model_type": family}
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if mtp:
        tensors |= mtp_layer(tensors, saved)
    if fp8:
        saved["quantization_config"] = FP8_BLOCKS
        for name, weight in architecture_of(saved).weights(saved).items():
            if weight.linear:
                _put_fp8(tensors, name, tensors[name])
    write_shards(path, tensors, shards)
    write_config(path, saved)
    write_byte_tokenizer(path)
    return path


def mtp_layer(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A multi-token-prediction layer as DeepSeek-V3 and GLM-4.5 name it; its block is a copy of the last layer's."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    last, extra = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    layer = {extra + n.removeprefix(last): t.clone() for n, t in tensors.items() if n.startswith(last)}
    norms = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    layer |= {extra + n: torch.ones(hidden).bfloat16() for n in norms}
    layer[extra + "eh_proj.weight"] = (torch.randn(hidden, 2 * hidden) * 0.05).bfloat16()
    layer[extra + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    layer[extra + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    return layer


def write_shards(path: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Write tensors in `shards` files, in the order of their names, and their index."""
    names = sorted(tensors)
    weight_map = {
        n: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(names)
    }
    for shard in sorted(set(weight_map.values())):
        chosen = {n: tensors[n].contiguous() for n in names if weight_map[n] == shard}
        save_file(chosen, path / shard, metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_config(path: Path, config: dict[str, Any]) -> None:
    (path / "config.json").write_text(json.dumps(config, indent=1))


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
        tensors |= mtp_layer(tensors, config)
    write_shards(path, tensors, shards)
    write_config(
        path,
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
            "quantization_config": FP8_BLOCKS,
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
