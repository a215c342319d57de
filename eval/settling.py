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
    without_tasks = msgspec.structs.replace(task, tasks=[])

    def asking(endpoint: Endpoint, work: Path) -> Callable[[list[Question]], list[AnsweredQuestion]]:
        def ask(stage: list[Question]) -> list[AnsweredQuestion]:
            return evaluate(endpoint, without_tasks, work, {q.question_id for q in stage}).answers

        return ask

    staged = evaluate_in_stages(drawn, task.stages, task.seed, asking(*source), asking(*quantized), policy, on_look)
    answered = {a.question_id for a in staged.source}
    asked = {q.question_id for q in drawn if str(q.question_id) in answered}
    before, after = (evaluate(endpoint, task, work, asked) for endpoint, work in (source, quantized))
    return (
        msgspec.structs.replace(before, answers=staged.source),
        msgspec.structs.replace(after, answers=staged.quantized),
    )


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
