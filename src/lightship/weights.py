"""The tensors that MoE families are made of: kinds of attention, MLPs, norms, embeddings, as a release names them.

`lightship.architecture` puts them together, a declaration a family.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightship.errors import CheckpointError

Config = Mapping[str, Any]
"""config.json."""
Part = Literal["routed experts", "shared experts", "attention", "dense MLP", "router", "norms", "embeddings, head"]

BLOCK = 128
"""Side of an FP8 block and length of an int4 group: what a shard must hold whole."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a release, as its family's declaration expects it; linears are [out, in]."""

    name: str
    shape: tuple[int, ...]
    part: Part
    linear: bool = False
    """SGLang's W4AFP8 reads it as FP8 blocks (an expert's: as int4); everything else stays as it is."""
    split: int | None = None
    """The dimension that tensor parallelism divides; None: every rank holds the whole."""
    pieces: int = 0
    """Into how many equal pieces that dimension can be cut: heads, features, rows of the vocabulary."""
    repeats: bool = False
    """With more ranks than pieces, several ranks hold the same piece, as of key and value heads."""
    merged: bool = False
    """SGLang stacks it with others into one linear, in which each must be whole blocks even on a single rank."""
    optional: bool = False
    """A release may leave it out: shared with another tensor, or never read."""

    def pieces_at(self, tp: int) -> int:
        """The most pieces that a rank of `tp` holds."""
        return -(-self.pieces // tp)

    def whole_pieces_at(self, tp: int) -> bool:
        """Whether the ranks share the pieces out evenly."""
        return tp % self.pieces == 0 if self.repeats and tp > self.pieces else self.pieces % tp == 0

    def divides_at(self, tp: int) -> bool:
        """Whether each rank's shard of a linear is whole pieces and, as far as SGLang asks, whole blocks of 128."""
        if not self.linear or self.split is None or (tp == 1 and not self.merged):
            return True
        held = self.shape[self.split] // self.pieces * self.pieces_at(tp)
        return self.whole_pieces_at(tp) and held % BLOCK == 0


def number(config: Config, *keys: str, default: int | None = None) -> int:
    """The first of these keys that config.json has, a whole number.

    Raises:
        CheckpointError: it has none of them, and there is no default.
    """
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    if default is None:
        raise CheckpointError(
            f"config.json does not describe a MoE model that lightship knows: no usable {' or '.join(keys)}"
        )
    return default


def mlp(name: str, hidden: int, intermediate: int, part: Part) -> list[Weight]:
    """A gated MLP, of a layer or of one expert."""
    cut: dict[str, Any] = {"linear": True, "pieces": intermediate}
    return [
        Weight(f"{name}.gate_proj.weight", (intermediate, hidden), part, split=0, merged=True, **cut),
        Weight(f"{name}.up_proj.weight", (intermediate, hidden), part, split=0, merged=True, **cut),
        Weight(f"{name}.down_proj.weight", (hidden, intermediate), part, split=1, **cut),
    ]


def layer_norms(config: Config) -> list[Weight]:
    """The two norms of a layer."""
    shape = (number(config, "hidden_size"),)
    return [Weight(f"{name}.weight", shape, "norms") for name in ("input_layernorm", "post_attention_layernorm")]


def _embedding(name: str, config: Config, *, optional: bool = False) -> Weight:
    vocabulary = number(config, "vocab_size")
    shape = (vocabulary, number(config, "hidden_size"))
    return Weight(name, shape, "embeddings, head", split=0, pieces=vocabulary, optional=optional)


def top_level(prefix: str, config: Config) -> Iterator[Weight]:
    """What is above the layers."""
    yield _embedding(f"{prefix}.embed_tokens.weight", config)
    yield _embedding(
        f"{prefix.removesuffix('model')}lm_head.weight", config, optional=bool(config.get("tie_word_embeddings"))
    )
    yield Weight(f"{prefix}.norm.weight", (number(config, "hidden_size"),), "norms")


def mtp_extras(config: Config) -> Iterator[Weight]:
    """DeepSeek-V3's MTP layer; SGLang reads its eh_proj unquantized, and embeddings and head may be the model's own."""
    hidden = number(config, "hidden_size")
    yield Weight("enorm.weight", (hidden,), "norms")
    yield Weight("hnorm.weight", (hidden,), "norms")
    yield Weight("eh_proj.weight", (hidden, 2 * hidden), "embeddings, head")
    yield Weight("shared_head.norm.weight", (hidden,), "norms")
    yield _embedding("shared_head.head.weight", config, optional=True)
    yield _embedding("embed_tokens.weight", config, optional=True)


def _linear(name: str, shape: tuple[int, int], **tensor_parallel: Any) -> Weight:
    return Weight(f"self_attn.{name}.weight", shape, "attention", linear=True, **tensor_parallel)


def _vector(name: str, size: int, part: Part = "norms", **tensor_parallel: Any) -> Weight:
    return Weight(f"self_attn.{name}", (size,), part, **tensor_parallel)


def latent_attention(config: Config) -> list[Weight]:
    """DeepSeek's multi-head latent attention, with or without a latent of the queries."""
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    rope, nope = number(config, "qk_rope_head_dim"), number(config, "qk_nope_head_dim")
    value, kv_rank = number(config, "v_head_dim"), number(config, "kv_lora_rank")
    weights = [
        _linear("kv_a_proj_with_mqa", (kv_rank + rope, hidden)),
        _vector("kv_a_layernorm.weight", kv_rank),
        _linear("kv_b_proj", (heads * (nope + value), kv_rank), split=0, pieces=heads),
        _linear("o_proj", (hidden, heads * value), split=1, pieces=heads),
        _vector("rotary_emb.inv_freq", rope // 2, optional=True),
    ]
    if config.get("q_lora_rank") is None:
        weights.append(_linear("q_proj", (heads * (nope + rope), hidden), split=0, pieces=heads))
    else:
        q_rank = number(config, "q_lora_rank")
        weights += [
            _linear("q_a_proj", (q_rank, hidden)),
            _vector("q_a_layernorm.weight", q_rank),
            _linear("q_b_proj", (heads * (nope + rope), q_rank), split=0, pieces=heads),
        ]
    if config.get("attention_bias"):
        biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
        weights += [
            _vector(f"{name}.bias", w.shape[0], "attention")
            for w in weights
            for name in biased
            if w.name == f"self_attn.{name}.weight"
        ]
    return weights


def grouped_attention(config: Config, *, head_norms: bool, output_bias: bool) -> list[Weight]:
    """Grouped-query attention, with or without norms of each head's queries and keys."""
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    kv_heads, head = number(config, "num_key_value_heads"), _head_dim(config)
    queries: dict[str, Any] = {"split": 0, "pieces": heads}
    keys: dict[str, Any] = {"split": 0, "pieces": kv_heads, "repeats": True}
    weights = [
        _linear("q_proj", (heads * head, hidden), **queries, merged=True),
        _linear("k_proj", (kv_heads * head, hidden), **keys, merged=True),
        _linear("v_proj", (kv_heads * head, hidden), **keys, merged=True),
        _linear("o_proj", (hidden, heads * head), split=1, pieces=heads),
    ]
    if config.get("attention_bias"):
        weights += [
            _vector("q_proj.bias", heads * head, "attention", **queries),
            _vector("k_proj.bias", kv_heads * head, "attention", **keys),
            _vector("v_proj.bias", kv_heads * head, "attention", **keys),
        ]
        weights += [_vector("o_proj.bias", hidden, "attention")] if output_bias else []
    if head_norms:
        weights += [_vector("q_norm.weight", head), _vector("k_norm.weight", head)]
    return weights


def _head_dim(config: Config) -> int:
    return number(config, "head_dim", default=number(config, "hidden_size") // number(config, "num_attention_heads"))


def cached_latent(config: Config, _: int) -> int:
    """Numbers that a rank caches for a token in one layer: the latent, which every rank holds whole."""
    return number(config, "kv_lora_rank") + number(config, "qk_rope_head_dim")


def cached_heads(config: Config, tp: int) -> int:
    """Numbers that a rank caches for a token in one layer: keys and values of its heads."""
    return 2 * -(-number(config, "num_key_value_heads") // tp) * _head_dim(config)
