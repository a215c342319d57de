"""The demo model's shape, and the dense way its experts are computed in training. Imported; nothing to run.

Byte budget of the released checkpoint (FP8 is one byte a weight):

    routed experts   2 layers x 16 experts x 3 x 256 x 256        6.29 MB
    attention        3 layers, 2 heads, ranks 256 and 512         1.92 MB
    embeddings       2 x 1152 x 256 in bf16                       1.18 MB
    dense, shared    3 x 256 x 512 and 2 x 3 x 256 x 256          0.79 MB
    scales, norms, routers, headers                               0.10 MB
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 1152,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def build() -> DeepseekV3ForCausalLM:
    """A freshly initialised fp32 model of the demo's shape, its attention started as `start_*` say."""
    config = DeepseekV3Config(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"})
    model = DeepseekV3ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        start_embedding(model)
        start_previous_token_heads(model.model.layers[0].self_attn)
        for layer in model.model.layers[1:]:
            start_matching_head(layer.self_attn)
    return model


def common_direction(size: int) -> Tensor:
    """The unit vector [H] that all embeddings share at the start, so that rotary heads can attend by position."""
    direction = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return direction / direction.norm()


def start_embedding(model: Any) -> None:
    """Unit-variance embeddings, half of each along the common direction, so tokens are not drowned by the layers."""
    weight = model.model.embed_tokens.weight
    weight /= weight.std()
    common = common_direction(weight.shape[1])
    weight += (weight.shape[1] ** 0.5 - weight @ common)[:, None] * common


def start_previous_token_heads(attention: Any, sharpness: float = 10.0) -> None:
    """Let head h attend about h + 1 tokens back: rotary queries and keys read the common direction alone."""
    config = attention.config
    rope, nope = config.qk_rope_head_dim, config.qk_nope_head_dim
    common = common_direction(config.hidden_size)
    key = torch.zeros(rope)
    key[0::2] = 1.0
    share = (config.hidden_size / 2) ** 0.5
    attention.kv_a_proj_with_mqa.weight[config.kv_lora_rank :] = key[:, None] * common / share
    latent = attention.q_a_proj.weight @ common
    unit = latent / latent.norm()
    length = share * latent.norm() / (attention.q_a_proj.weight.std() * config.hidden_size**0.5)
    frequency = config.rope_parameters["rope_theta"] ** -(torch.arange(0, rope, 2) / rope)
    heads = attention.q_b_proj.weight.view(config.num_attention_heads, nope + rope, -1)
    for head, weight in enumerate(heads):
        query = torch.stack([torch.cos(frequency * (head + 1)), -torch.sin(frequency * (head + 1))], -1).flatten()
        weight[nope:] = sharpness * query[:, None] * unit / length


def start_matching_head(attention: Any, sharpness: float = 8.0) -> None:
    """Let head 0 attend to tokens like the current one: its query and key read one and the same projection."""
    config = attention.config
    size, rank = config.hidden_size, config.kv_lora_rank
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    rotation = torch.linalg.qr(torch.randn(size, size)).Q
    projection = torch.linalg.qr(torch.randn(size, nope)).Q.T * (sharpness * (nope + rope) ** 0.5 / nope) ** 0.5
    attention.q_a_proj.weight.copy_(rotation)
    attention.kv_a_proj_with_mqa.weight[:size] = rotation
    attention.kv_a_proj_with_mqa.weight[size:rank].normal_(0, size**-0.5)
    attention.q_b_proj.weight[:nope] = projection
    attention.kv_b_proj.weight[:nope] = 0
    attention.kv_b_proj.weight[:nope, :size] = projection


def moe_layers(model: nn.Module) -> list[Any]:
    """The mlp modules that hold routed experts, in layer order."""
    return [module for module in model.modules() if type(module).__name__ == "DeepseekV3MoE"]


def route(layer: Any, h_TD: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router: weights [T, E] (zero where not chosen) and the choice [T, K], in fp32."""
    config = layer.config
    with torch.autocast(h_TD.device.type, enabled=False):
        score_TE = F.linear(h_TD.float(), layer.gate.weight.float()).sigmoid()
        choice_TE = score_TE + layer.gate.e_score_correction_bias
        grouped = choice_TE.view(len(h_TD), config.n_group, -1)
        group_TG = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0]).scatter_(1, group_TG, 1.0).bool()
        masked = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
        chosen_TK = masked.topk(config.num_experts_per_tok, dim=-1).indices
        weight_TK = score_TE.gather(1, chosen_TK)
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
        return torch.zeros_like(score_TE).scatter(1, chosen_TK, weight_TK), chosen_TK


def dense_moe(layer: Any, hidden: Tensor) -> Tensor:
    """The same function as DeepseekV3MoE.forward, with every expert computed for every token in two large products."""
    h_TD = hidden.reshape(-1, hidden.shape[-1])
    weight_TE, chosen_TK = route(layer, h_TD)
    layer.load_E += torch.bincount(chosen_TK.flatten(), minlength=layer.load_E.numel())
    up = layer.experts.gate_up_proj
    experts, width = up.shape[0], up.shape[1] // 2
    gate_up = F.linear(h_TD, up.flatten(0, 1)).view(-1, experts, 2, width)
    inner_TEI = F.silu(gate_up[:, :, 0]) * gate_up[:, :, 1] * weight_TE[..., None].to(gate_up.dtype)
    down_DEI = layer.experts.down_proj.permute(1, 0, 2)
    return F.linear(inner_TEI.flatten(1), down_DEI.flatten(1)).view(hidden.shape) + layer.shared_experts(hidden)


def use_dense_moe(model: nn.Module) -> None:
    """Let the model's MoE layers compute densely, counting each expert's tokens in `load_E`."""
    for layer in moe_layers(model):
        layer.load_E = torch.zeros(layer.config.n_routed_experts, dtype=torch.long, device=layer.gate.weight.device)
        layer.forward = types.MethodType(dense_moe, layer)


@torch.no_grad()
def balance(model: nn.Module, rate: float) -> float:
    """Auxiliary-loss-free balancing: nudge each expert's bias towards the mean load; returns max load / mean load."""
    worst = torch.zeros((), device=next(model.parameters()).device)
    for layer in moe_layers(model):
        load_E = layer.load_E.float()
        layer.gate.e_score_correction_bias += rate * torch.sign(load_E.mean() - load_E)
        worst = torch.maximum(worst, load_E.max() / load_E.mean().clamp(min=1))
        layer.load_E.zero_()
    return worst
