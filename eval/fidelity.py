"""Is it still the same model: next-token distributions of source and quantized model on held-out text, token by token.

    lightship release demo/checkpoint --recipe recipes/demo.toml --no-promote

Accuracy needs thousands of questions to see a small loss; the KL divergence sees it in a few thousand tokens, because
every token is a measurement. It says how far apart the models are, not which one is better.
"""

import math
import time
from collections.abc import Iterable, Sequence
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


def _sums_of_scene(reference: Any, models: Sequence[Any], batches: "Iterable[torch.Tensor]") -> "list[torch.Tensor]":
    """Per model, float64 [5]: tokens, KL, same top token, source's and quantized model's negative log-likelihood."""
    import torch

    sums = [torch.zeros(5, dtype=torch.float64) for _ in models]
    for ids_BS in batches:
        next_B1S = ids_BS[:, 1:, None]
        source_BSV = _log_probabilities(reference, ids_BS)
        for total, model in zip(sums, models, strict=True):
            quantized_BSV = _log_probabilities(model, ids_BS)
            kl_BS = (source_BSV.exp() * (source_BSV - quantized_BSV)).sum(dim=-1)
            agree_BS = source_BSV.argmax(dim=-1) == quantized_BSV.argmax(dim=-1)
            total += torch.stack(
                [
                    torch.tensor(next_B1S.numel(), dtype=torch.float64),
                    kl_BS.double().sum(),
                    agree_BS.double().sum(),
                    -source_BSV.gather(-1, next_B1S).double().sum(),
                    -quantized_BSV.gather(-1, next_B1S).double().sum(),
                ]
            )
    return sums


def _log_probabilities(model: Any, ids_BS: "torch.Tensor") -> "torch.Tensor":
    """Of every token that has a successor in the text, fp32 [B, S - 1, V]."""
    logits_BSV: torch.Tensor = model(ids_BS, use_cache=False).logits
    return logits_BSV[:, :-1].float().log_softmax(dim=-1)


def _scene(scene: str, quantized: Path, sums: "torch.Tensor") -> SceneFidelity:
    tokens, kl, agree, nll_source, nll_quantized = sums.tolist()
    if not math.isfinite(kl + nll_source + nll_quantized):
        raise EvaluationError(
            f"{quantized} or its source gives non-finite probabilities on scene {scene!r}; run `lightship verify`"
        )
    return SceneFidelity(
        scene=scene,
        tokens=int(tokens),
        kl=max(0.0, kl / tokens),
        top1_agreement=agree / tokens,
        perplexity_source=math.exp(nll_source / tokens),
        perplexity_quantized=math.exp(nll_quantized / tokens),
    )
