"""Is it still the same model: next-token distributions of source and quantized model on held-out text, token by token.

    lightship release demo/checkpoint --recipe recipes/demo.toml --no-promote

Accuracy needs thousands of questions to see a small loss; the KL divergence sees it in a few thousand tokens, because
every token is a measurement. It says how far apart the models are, not which one is better.

Where the models part is seen by layer: each layer's output goes through the final norm and the head (the logit lens),
and what the two models would predict from there is compared.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.errors import EvaluationError
from lightship.progress import tracked
from lightship.recipe import FidelityText
from lightship.records import Fidelity, SceneFidelity

if TYPE_CHECKING:
    import torch

    from lightship.experts import Activations

TOKENS_A_BATCH = 2048
"""Bounds the memory of the log-probabilities: this many rows of the vocabulary's size a model."""


def measure_fidelity(
    source: Path, quantized: Path, text: FidelityText, activations: "Activations" = "dynamic"
) -> Fidelity:
    """Compare one quantized checkpoint with its source; see `measure_fidelities`."""
    return measure_fidelities(source, [quantized], text, activations)[0]


def measure_fidelities(
    source: Path, quantized: Sequence[Path], text: FidelityText, activations: "Activations" = "dynamic"
) -> list[Fidelity]:
    """Compare several quantized checkpoints with one source, which reads each batch of text once.

    All models are in memory at the same time: the log-probabilities of a large vocabulary are bigger than a small
    model, and would have to be stored otherwise. The seconds of each result are those of the whole run.

    Raises:
        CheckpointError: a checkpoint cannot be loaded.
        EvaluationError: a model's output is not finite.
        LightshipError: a text file is missing, malformed, or shorter than one sequence.
    """
    import torch

    from lightship.causal_lm import load_causal_lm, load_tokenizer
    from lightship.text import digest_of_text, read_scenes

    started = time.monotonic()
    tokenizer = load_tokenizer(source)
    reference = load_causal_lm(source)
    models = [load_causal_lm(path, activations=activations) for path in quantized]
    scenes: list[list[SceneFidelity]] = [[] for _ in models]
    with torch.inference_mode():
        for scene, sequences in read_scenes(text, tokenizer).items():
            batches = torch.stack(sequences).split(max(1, TOKENS_A_BATCH // text.sequence_tokens))
            sums = _sums_of_scene(reference, models, tracked(batches, f"comparing on {scene}"))
            for path, of_model, s in zip(quantized, scenes, sums, strict=True):
                of_model.append(_scene(scene, path, s))
    seconds = time.monotonic() - started
    digest = digest_of_text(text.sources)
    return [
        Fidelity(scenes=of_model, seconds=seconds, text_digest=digest, activations=activations) for of_model in scenes
    ]


@dataclass
class _Sums:
    """Of one model over a scene's tokens."""

    tokens: int = 0
    kl_by_layer: dict[int, float] = field(default_factory=dict)
    agree: float = 0.0
    nll_source: float = 0.0
    nll_quantized: float = 0.0


def _sums_of_scene(reference: Any, models: Sequence[Any], batches: "Iterable[torch.Tensor]") -> list[_Sums]:
    """Per model."""
    sums = [_Sums() for _ in models]
    for ids_BS in batches:
        next_B1S = ids_BS[:, 1:, None]
        states = [_states(model, ids_BS) for model in (reference, *models)]
        layers = len(states[0])
        for layer in range(layers):
            source_BSV = _log_probabilities(reference, states[0][layer])
            for total, model, of_model in zip(sums, models, states[1:], strict=True):
                quantized_BSV = _log_probabilities(model, of_model[layer])
                kl = float((source_BSV.exp() * (source_BSV - quantized_BSV)).sum(dim=-1).double().sum())
                total.kl_by_layer[layer] = total.kl_by_layer.get(layer, 0.0) + kl
                if layer == layers - 1:
                    agree_BS = source_BSV.argmax(dim=-1) == quantized_BSV.argmax(dim=-1)
                    total.tokens += next_B1S.numel()
                    total.agree += float(agree_BS.double().sum())
                    total.nll_source -= float(source_BSV.gather(-1, next_B1S).double().sum())
                    total.nll_quantized -= float(quantized_BSV.gather(-1, next_B1S).double().sum())
    return sums


def _states(model: Any, ids_BS: "torch.Tensor") -> "list[torch.Tensor]":
    """What each layer leaves of every token that has a successor in the text, normed: [B, S - 1, H] a layer."""
    _, *states, last_BSH = model.model(ids_BS, use_cache=False, output_hidden_states=True).hidden_states
    return [x_BSH[:, :-1] for x_BSH in (*map(model.model.norm, states), last_BSH)]


def _log_probabilities(model: Any, x_BSH: "torch.Tensor") -> "torch.Tensor":
    """Of the next token, fp32 [B, S, V]."""
    logits_BSV: torch.Tensor = model.lm_head(x_BSH)
    return logits_BSV.float().log_softmax(dim=-1)


def _scene(scene: str, quantized: Path, sums: _Sums) -> SceneFidelity:
    if not math.isfinite(sum(sums.kl_by_layer.values()) + sums.nll_source + sums.nll_quantized):
        raise EvaluationError(
            f"{quantized} or its source gives non-finite probabilities on scene {scene!r}; run `lightship verify`"
        )
    kl_by_layer = [max(0.0, kl / sums.tokens) for kl in sums.kl_by_layer.values()]
    return SceneFidelity(
        scene=scene,
        tokens=sums.tokens,
        kl=kl_by_layer[-1],
        top1_agreement=sums.agree / sums.tokens,
        perplexity_source=math.exp(sums.nll_source / sums.tokens),
        perplexity_quantized=math.exp(sums.nll_quantized / sums.tokens),
        kl_by_layer=kl_by_layer,
    )
