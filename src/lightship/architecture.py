"""The model families that lightship knows, a declaration each: which tensors a release holds, of which shape, and how.

A declaration says which layers have routed experts, what else a layer holds, which weights are linears (FP8 in the
result, in the source's blocks or in ours) and which dimension of a weight tensor parallelism divides. Everything that
asks about a family asks its declaration: the key census, the plan, the fit on GPUs, the model that calibration runs.

    architecture_of(config).weights(config)     # name -> Weight, for every tensor of a release
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from lightship.errors import CheckpointError
from lightship.weights import (
    Config,
    Weight,
    cached_heads,
    cached_latent,
    grouped_attention,
    latent_attention,
    layer_norms,
    mlp,
    mtp_extras,
    number,
    top_level,
)


@dataclass(frozen=True)
class Attention:
    """A kind of attention: its tensors below `self_attn`, and what its cache holds."""

    weights: Callable[[Config], list[Weight]]
    cached_values: Callable[[Config, int], int]
    """(config, tp) -> numbers that a rank caches for a token in one layer."""


@dataclass(frozen=True)
class Architecture:
    """A family of MoE models; the functions take config.json."""

    model_types: tuple[str, ...]
    transformers_type: str
    """The model type under which transformers builds it."""
    attention: Attention
    is_moe: Callable[[Config, int], bool]
    """(config, layer number) -> whether the layer has routed experts."""
    experts_keys: tuple[str, ...] = ("n_routed_experts",)
    """Keys of the number of routed experts; the first that config.json has counts."""
    router_bias: bool = False
    shared_experts: bool = True
    mtp: bool = False
    """Multi-token-prediction layers may follow the last layer."""
    prefix: str = "model"
    """Of the names of layers, embeddings and last norm."""

    def experts(self, config: Config) -> int:
        """Routed experts a layer."""
        return number(config, *self.experts_keys)

    def mtp_layers(self, config: Config) -> int:
        """Multi-token-prediction layers that config.json declares; a release may leave them out all the same."""
        return number(config, "num_nextn_predict_layers", "num_mtp_layers", default=0) if self.mtp else 0

    def layer_name(self, layer: int) -> str:
        return f"{self.prefix}.layers.{layer}"

    def weights(self, config: Config) -> dict[str, Weight]:
        """Every tensor by its name, FP8 scales apart, in the order of the layers."""
        layers = number(config, "num_hidden_layers")
        every = list(top_level(self.prefix, config))
        for layer in range(layers + self.mtp_layers(config)):
            of_layer = [*layer_norms(config), *self.attention.weights(config)]
            if self.is_moe(config, layer) or layer >= layers:
                of_layer += self._moe(config)
            else:
                of_layer += mlp("mlp", number(config, "hidden_size"), number(config, "intermediate_size"), "dense MLP")
            if layer >= layers:
                of_layer += mtp_extras(config)
            every += [replace(w, name=f"{self.layer_name(layer)}.{w.name}") for w in of_layer]
        return {weight.name: weight for weight in every}

    def _moe(self, config: Config) -> Iterator[Weight]:
        hidden, intermediate = number(config, "hidden_size"), number(config, "moe_intermediate_size")
        experts = self.experts(config)
        yield Weight("mlp.gate.weight", (experts, hidden), "router")
        if self.router_bias:
            yield Weight("mlp.gate.e_score_correction_bias", (experts,), "router")
        for expert in range(experts):
            yield from mlp(f"mlp.experts.{expert}", hidden, intermediate, "routed experts")
        if self.shared_experts and (shared := number(config, "n_shared_experts", default=0)):
            yield from mlp("mlp.shared_experts", hidden, intermediate * shared, "shared experts")


def _after_first_dense(config: Config, layer: int) -> bool:
    return layer >= number(config, "first_k_dense_replace", default=0)


def _every_sparse_step(config: Config, layer: int) -> bool:
    dense = config.get("mlp_only_layers") or ()
    return layer not in dense and (layer + 1) % number(config, "decoder_sparse_step", default=1) == 0


LATENT = Attention(latent_attention, cached_latent)
"""DeepSeek's multi-head latent attention: every rank caches the same latent."""

ARCHITECTURES = (
    Architecture(
        model_types=("deepseek_v3", "kimi_k2"),
        transformers_type="deepseek_v3",
        attention=LATENT,
        is_moe=_after_first_dense,
        router_bias=True,
        mtp=True,
    ),
    Architecture(
        model_types=("deepseek_v2",),
        transformers_type="deepseek_v2",
        attention=LATENT,
        is_moe=_after_first_dense,
    ),
    Architecture(
        model_types=("qwen3_moe",),
        transformers_type="qwen3_moe",
        attention=Attention(lambda c: grouped_attention(c, head_norms=True, output_bias=True), cached_heads),
        is_moe=_every_sparse_step,
        experts_keys=("num_experts", "num_local_experts"),
        shared_experts=False,
    ),
    Architecture(
        model_types=("glm4_moe",),
        transformers_type="glm4_moe",
        attention=Attention(
            lambda c: grouped_attention(c, head_norms=bool(c.get("use_qk_norm")), output_bias=False), cached_heads
        ),
        is_moe=_after_first_dense,
        router_bias=True,
        mtp=True,
    ),
)


def architecture_of(config: Config, names: Iterable[str] = ()) -> Architecture:
    """The declaration of the model that config.json describes; `names` are the checkpoint's tensors.

    Raises:
        CheckpointError: no declaration has its model type; says what one would need.
    """
    model_type = config.get("model_type")
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(sorted(t for a in ARCHITECTURES for t in a.model_types))
    experts = sorted({".".join("N" if p.isdecimal() else p for p in n.split(".")) for n in names if ".experts." in n})
    keys = sorted(k for k in config if "expert" in k or "intermediate" in k or k in ("text_config", "layer_types"))
    raise CheckpointError(
        f"config.json: model_type {model_type!r} is not supported (supported: {known}). A declaration in "
        "src/lightship/architecture.py would need the class that transformers builds it with, its attention, which "
        f"layers have routed experts (keys here: {', '.join(keys) or 'none of experts'}), and the names of their "
        f"tensors (here: {', '.join(experts[:8]) or 'none with .experts.'})"
    )
