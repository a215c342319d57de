"""Sequences of unequal length in one forward pass, without padding: each attends to its own keys and values.

All tokens of a step lie in one row [1, T]. Linears, router and experts do not care whose token is whose; only attention
does, and transformers lets us bring our own: it appends a sequence's new keys and values to what is kept of it, and
attends there. The model is called without a transformers cache, so its multi-head latent attention expands the latents
of the new tokens alone, not those of the whole past at each step. Newcomers and running sequences share a step.

Shapes: T tokens of the step, Q query tokens of one sequence, S its tokens so far, heads h, head size d.
"""

from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch

from lightship.errors import ServingError

ATTENTION = "lightship_ragged"
ARCHITECTURES = ("deepseek_v3",)
"""Model types whose layers all attend causally through transformers' attention interface, and keep no other state."""
GROWTH = 256
"""Tokens by which a sequence's buffers grow."""


@dataclass(frozen=True)
class Span:
    """The next tokens of one sequence, and of how many of them, from the end, the logits are wanted."""

    sequence: int
    tokens: list[int]
    logits: int


@dataclass(frozen=True)
class Step:
    """One forward pass: the spans to compute, after forgetting the sequences that have ended."""

    spans: list[Span]
    ended: list[int] = field(default_factory=list)


class KeysValues:
    """Keys [h, capacity, d_k] and values [h, capacity, d_v] of one sequence, a pair for each layer."""

    def __init__(self) -> None:
        self.tokens = 0
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def append(self, layer: int, k_hQd: torch.Tensor, v_hQd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new tokens after the `tokens` known ones; returns all keys and values, [h, S, d]."""
        end = self.tokens + k_hQd.shape[1]
        kept = self.layers.get(layer)
        if kept is None or kept[0].shape[1] < end:
            kept = self.layers[layer] = (
                self._grown(k_hQd, kept and kept[0], end),
                self._grown(v_hQd, kept and kept[1], end),
            )
        keys, values = kept
        keys[:, self.tokens : end] = k_hQd
        values[:, self.tokens : end] = v_hQd
        return keys[:, :end], values[:, :end]

    def _grown(self, like_hQd: torch.Tensor, old: torch.Tensor | None, end: int) -> torch.Tensor:
        heads, _, size = like_hQd.shape
        new = like_hQd.new_empty(heads, end + GROWTH, size)
        if old is not None:
            new[:, : self.tokens] = old[:, : self.tokens]
        return new


class RaggedModel:
    """A loaded model (`load_causal_lm`) and the keys and values of the sequences in flight.

    Raises:
        ServingError: an architecture whose attention is not known to be plain and causal.
    """

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        if model.config.model_type not in ARCHITECTURES:
            raise ServingError(
                f"engine local serves {', '.join(ARCHITECTURES)}, this checkpoint is {model.config.model_type}; "
                "serve it with engine sglang"
            )
        AttentionInterface.register(ATTENTION, attend)
        AttentionMaskInterface.register(ATTENTION, _no_mask)
        model.config._attn_implementation = ATTENTION
        self.model = model
        self.sequences: dict[int, KeysValues] = {}

    @torch.inference_mode()
    def run(self, step: Step, *, logits: bool = True) -> torch.Tensor:
        """Run one step; returns the logits [sum of the spans' `logits`, vocabulary], none if not `logits`."""
        for ended in step.ended:
            self.sequences.pop(ended, None)
        sequences = [self.sequences.setdefault(span.sequence, KeysValues()) for span in step.spans]
        ends = list(accumulate(len(span.tokens) for span in step.spans))
        wanted = [i for span, end in zip(step.spans, ends, strict=True) for i in range(end - span.logits, end)]
        known = [kept.tokens for kept in sequences]
        positions = [torch.arange(k, k + len(span.tokens)) for k, span in zip(known, step.spans, strict=True)]
        masks = [_causal_mask(len(span.tokens), k, self.model.dtype) for k, span in zip(known, step.spans, strict=True)]
        output = self.model(
            input_ids=torch.tensor([[token for span in step.spans for token in span.tokens]]),
            position_ids=torch.cat(positions)[None],
            use_cache=False,
            logits_to_keep=torch.tensor(wanted if logits else [], dtype=torch.long),
            ragged=list(zip(sequences, pairwise([0, *ends]), masks, strict=True)),
        )
        for kept, span in zip(sequences, step.spans, strict=True):
            kept.tokens += len(span.tokens)
        return output.logits[0]


def attend(
    module: Any,
    q_1hTd: torch.Tensor,
    k_1hTd: torch.Tensor,
    v_1hTd: torch.Tensor,
    attention_mask: None,  # noqa: ARG001  (transformers' signature; _no_mask sees to it)
    *,
    scaling: float,
    ragged: list[tuple[KeysValues, tuple[int, int], torch.Tensor | None]],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: returns [1, T, h, d_v]."""
    out_ThD = q_1hTd.new_empty(q_1hTd.shape[2], q_1hTd.shape[1], v_1hTd.shape[-1])
    for kept, (begin, end), mask_QS in ragged:
        k_hSd, v_hSd = kept.append(module.layer_idx, k_1hTd[0, :, begin:end], v_1hTd[0, :, begin:end])
        q_hQd, k_hdS = q_1hTd[0, :, begin:end] * scaling, k_hSd.transpose(1, 2)
        scores_hQS = torch.bmm(q_hQd, k_hdS) if mask_QS is None else torch.baddbmm(mask_QS, q_hQd, k_hdS)
        out_ThD[begin:end] = torch.bmm(scores_hQS.softmax(-1), v_hSd).transpose(0, 1)
    return out_ThD[None], None


def _causal_mask(new: int, known: int, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scores [Q, S] of `new` tokens after `known` ones; None if one token sees everything."""
    return torch.full((new, known + new), -torch.inf, dtype=dtype).triu(known + 1) if new > 1 else None


def _no_mask(*_: Any, **__: Any) -> None:
    """transformers' mask interface: `attend` masks by itself."""
