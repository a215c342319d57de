"""Both models asked in turns, a stage of questions at a time, until the gate's accuracy_loss is settled.

    [accuracy]
    sequential = true

Answers are logged as always, so an interrupted evaluation goes on with the stage it was in.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec

from lightship.endpoint import Endpoint
from lightship.eval.accuracy import all_questions, evaluate
from lightship.eval.questions import Question, draw
from lightship.eval.sequential import Judged, LossPolicy
from lightship.eval.stages import evaluate_in_stages, stage_ends
from lightship.policy import Gate
from lightship.recipe import AccuracyTask
from lightship.records import Accuracy, AnsweredQuestion


def evaluate_until_settled(
    source: tuple[Endpoint, Path],
    quantized: tuple[Endpoint, Path],
    task: AccuracyTask,
    policy: LossPolicy,
    on_look: Callable[[Judged], None] = lambda _: None,
) -> tuple[Accuracy, Accuracy]:
    """Both models' answers to the questions that it took, in the order in which they were asked; further tasks are
    asked in full, at the end.

    Args:
        source, quantized: each one's server, and the directory of its answers, as in `accuracy.evaluate`.
        on_look: hears what each look says.

    Raises:
        EvaluationError: as `accuracy.evaluate`.
    """
    drawn = draw(all_questions(task).test, task.limit, task.seed)
    models = _Asked(*source, task), _Asked(*quantized, task)
    staged = evaluate_in_stages(drawn, task.stages, task.seed, models[0].ask, models[1].ask, policy, on_look)
    # The answers that were judged are those that are kept.
    return models[0].record(staged.source), models[1].record(staged.quantized)


class _Asked:
    """One model, and what was recorded of it stage by stage."""

    def __init__(self, endpoint: Endpoint, work: Path, task: AccuracyTask) -> None:
        self.endpoint, self.work, self.task = endpoint, work, task
        self.stages: list[Accuracy] = []

    def ask(self, stage: list[Question]) -> list[AnsweredQuestion]:
        task = msgspec.structs.replace(self.task, tasks=[])
        self.stages.append(evaluate(self.endpoint, task, self.work, {q.question_id for q in stage}))
        return self.stages[-1].answers

    def record(self, answers: list[AnsweredQuestion]) -> Accuracy:
        last, tasks = self.stages[-1], self.task.tasks
        further = evaluate(self.endpoint, self.task, self.work, []).tasks if tasks else []
        seconds = sum(stage.seconds for stage in self.stages)
        return msgspec.structs.replace(last, answers=answers, tasks=further, seconds=seconds)


def looks_of(accuracy: Accuracy, task: AccuracyTask) -> list[int]:
    """How many questions were answered at each look; none where all were asked at once."""
    if accuracy.planned is None:
        return []
    return [end for end in stage_ends(accuracy.planned, task.stages) if end <= len(accuracy.answers)]


def loss_policy(gate: Gate) -> LossPolicy:
    """The strictest limit of the loss against the source, which decides when enough was asked."""
    limits = [limit for against, limit in gate.limits("accuracy_loss") if against != "champion"]
    return LossPolicy(min(limits), gate.confidence)


def sentence(look: Judged) -> str:
    """What a look says, for the terminal."""
    low, high = (f"{100 * bound:.1f}".replace("-", "−") for bound in (look.low, look.high))
    verdict = "go on" if look.step == "continue" else look.step
    return (
        f"{look.answered:,} of {look.planned:,} questions: lost {look.lost}, gained {look.gained}, "
        f"the loss is {low} to {high} points, the limit {100 * look.limit:g}: {verdict}"
    )
