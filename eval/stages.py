"""Questions in stages: the order in which they are asked, and the loop that asks until it is settled.

    evaluate_in_stages(questions, [0.25, 0.5, 0.75, 1.0], seed, ask_source, ask_quantized, LossPolicy(limit=0.01))

The order is fixed by the questions and the seed, and random within each subject. Any beginning of it holds the subjects
in their shares, to within a question each, so that a stage is a small version of the whole.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lightship.eval.sequential import Judged, LossPolicy, judge
from lightship.records import AnsweredQuestion


class Asked(Protocol):
    """What the order needs of a question."""

    @property
    def question_id(self) -> int | str: ...

    @property
    def category(self) -> str: ...


Q = TypeVar("Q", bound=Asked)
Ask = Callable[[list[Q]], Sequence[AnsweredQuestion]]
"""Ask a model these questions, each for the first time."""


@dataclass(frozen=True)
class StagedAnswers:
    """Both models' answers, and what each look said."""

    source: list[AnsweredQuestion]
    quantized: list[AnsweredQuestion]
    looks: list[Judged]

    @property
    def counts(self) -> list[int]:
        """Questions answered at each look."""
        return [look.answered for look in self.looks]


def evaluate_in_stages(
    questions: Sequence[Q],
    stages: Sequence[float],
    seed: int,
    ask_source: Ask[Q],
    ask_quantized: Ask[Q],
    policy: LossPolicy,
    on_look: Callable[[Judged], None] = lambda _: None,
) -> StagedAnswers:
    """Ask both models the questions, a stage after the other, until the loss is settled or all are asked.

    Args:
        stages: fractions of the questions after which to look, increasing; the last is 1.
        on_look: hears what each look says.
    """
    order = stage_order(questions, seed)
    ends = stage_ends(len(order), stages)
    source: dict[str, AnsweredQuestion] = {}
    quantized: dict[str, AnsweredQuestion] = {}
    looks: list[Judged] = []
    start = 0
    for number, end in enumerate(ends, start=1):
        stage = order[start:end]
        start = end
        source |= {a.question_id: a for a in ask_source(stage)}
        quantized |= {a.question_id: a for a in ask_quantized(stage)}
        assert source.keys() == quantized.keys() == {str(q.question_id) for q in order[:end]}
        lost = sum(a.correct and not quantized[i].correct for i, a in source.items())
        gained = sum(quantized[i].correct and not a.correct for i, a in source.items())
        looks.append(judge(lost, gained, ends[:number], ends[-1], policy))
        on_look(looks[-1])
        if looks[-1].step != "continue":
            break
    asked = [str(q.question_id) for q in order[:start]]
    return StagedAnswers([source[i] for i in asked], [quantized[i] for i in asked], looks)


def stage_order(questions: Sequence[Q], seed: int) -> list[Q]:
    """All questions in the order in which they are asked: shuffled within each subject, the subjects interleaved."""
    by_subject: dict[str, list[Q]] = defaultdict(list)
    for question in sorted(questions, key=lambda q: str(q.question_id)):
        by_subject[question.category].append(question)
    placed = []
    for subject, of in by_subject.items():
        rng = random.Random(f"{seed} {subject}")
        offset = rng.random()
        for rank, question in enumerate(rng.sample(of, len(of))):
            placed.append(((rank + offset) / len(of), subject, rank, question))
    return [question for *_, question in sorted(placed, key=lambda p: p[:3])]


def stage_ends(questions: int, stages: Sequence[float]) -> list[int]:
    """How many questions are answered at the end of each stage; stages that would add none are left out."""
    assert stages[-1] == 1, stages
    return sorted({max(1, round(questions * fraction)) for fraction in stages})
