"""How alike two models answer, beyond right and wrong: the same letter, the same text, and where the texts part.

    lightship release demo/checkpoint --recipe recipes/demo.toml --no-promote

Both decode greedily from the same prompts, so any difference is the quantization's. Two models can be equally accurate
and agree little; this says so. It does not say which one is better.
"""

from statistics import fmean

from lightship.errors import EvaluationError
from lightship.records import Accuracy, Agreement


def measure_agreement(source: Accuracy, quantized: Accuracy) -> Agreement:
    """Compare the answers question by question.

    Raises:
        EvaluationError: the two did not answer the same questions.
    """
    others = {a.question_id: a for a in quantized.answers}
    if others.keys() != {a.question_id for a in source.answers}:
        raise EvaluationError("the two models did not answer the same questions; evaluate both with one recipe")
    pairs = [(a, others[a.question_id]) for a in source.answers]
    prefixes = [_common_prefix(a.text, b.text) for a, b in pairs]
    longest = [max(len(a.text), len(b.text)) for a, b in pairs]
    return Agreement(
        questions=len(pairs),
        same_answer=fmean(a.predicted == b.predicted for a, b in pairs),
        same_text=fmean(a.text == b.text for a, b in pairs),
        common_prefix=fmean(prefixes),
        common_share=fmean(p / n if n else 1.0 for p, n in zip(prefixes, longest, strict=True)),
    )


def _common_prefix(a: str, b: str) -> int:
    """Characters before the texts part."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
