"""Both models are asked a stage at a time, and no more once the loss is settled."""

import json
from pathlib import Path

from lightship.eval.comparison import compare
from lightship.eval.sequential import Judged, LossPolicy, judge_comparison
from lightship.eval.settling import evaluate_until_settled, looks_of, sentence
from lightship.recipe import AccuracyTask
from lightship.records import Accuracy
from tests.eval.puzzles import write_questions
from tests.eval.stub_server import Reply, Stub, serving

STAGES = [0.25, 0.5, 1.0]
POLICY = LossPolicy(limit=0.3)


def questions_in(folder: Path) -> Path:
    return write_questions(folder / "puzzles", {"biology": 40, "math": 40})


def task_of(questions: Path, **settings: object) -> AccuracyTask:
    return AccuracyTask(questions=str(questions), max_tokens=64, sequential=True, stages=STAGES, **settings)  # type: ignore[arg-type]


def ask(source: Stub, quantized: Stub, task: AccuracyTask, folder: Path) -> tuple[Accuracy, Accuracy, list[Judged]]:
    looks: list[Judged] = []
    before, after = evaluate_until_settled(
        (source.endpoint, folder / "source"), (quantized.endpoint, folder / "quantized"), task, POLICY, looks.append
    )
    return before, after, looks


def right_in(questions: Path, *subjects: str):  # type: ignore[no-untyped-def]
    """A model that knows these subjects."""
    rows = [json.loads(line) for line in (questions / "test.jsonl").read_bytes().splitlines()]
    known = {r["question"]: r["answer"] for r in rows if r["category"] in subjects}

    def reply(prompt: str) -> Reply:
        asked = prompt.rpartition("Question:\n")[2].partition("\nOptions:")[0]
        return f"The answer is ({known.get(asked, 'J')}).", "stop"

    return reply


def test_the_same_model_passes_at_the_first_look_and_the_rest_is_not_asked(tokenizer: Path, tmp_path: Path) -> None:
    questions = questions_in(tmp_path)
    knows = right_in(questions, "biology", "math")
    with serving(tokenizer, knows) as source, serving(tokenizer, knows) as quantized:
        before, after, looks = ask(source, quantized, task_of(questions), tmp_path)
    assert [look.step for look in looks] == ["continue", "pass"]
    assert len(source.prompts) == len(quantized.prompts) == looks[-1].answered < before.planned == 80
    assert before.accuracy == after.accuracy == 1
    assert looks_of(before, task_of(questions)) == [look.answered for look in looks]
    assert "80 questions: lost 0, gained 0" in sentence(looks[-1])


def test_a_model_that_lost_a_subject_fails_early_and_the_comparison_says_so(tokenizer: Path, tmp_path: Path) -> None:
    questions = questions_in(tmp_path)
    task = task_of(questions)
    with (
        serving(tokenizer, right_in(questions, "biology", "math")) as source,
        serving(tokenizer, lambda _: ("no idea", "stop")) as quantized,
    ):
        before, after, looks = ask(source, quantized, task, tmp_path)
        judged = judge_comparison(compare(before, after, looks_of(before, task), before.planned), POLICY)
        assert (looks[-1].step, looks[-1].answered) == ("fail", 40)
        assert (judged.step, judged.low, judged.high) == ("fail", looks[-1].low, looks[-1].high)
        by_subject = {subject: asked for subject, (_, asked) in before.by_category().items()}
        assert by_subject == {"biology": 20, "math": 20}, "a stage is a small version of the whole"

        again = ask(source, quantized, task, tmp_path)
    assert len(source.prompts) == len(quantized.prompts) == 40, "answers that are logged are not asked for again"
    assert again[0].answers == before.answers


def test_releases_that_stopped_at_different_looks_were_asked_under_the_same_settings(
    tokenizer: Path, tmp_path: Path
) -> None:
    questions = questions_in(tmp_path)
    knows = right_in(questions, "biology", "math")
    with serving(tokenizer, knows) as source, serving(tokenizer, lambda _: ("no idea", "stop")) as damaged:
        passed, _, _ = ask(source, source, task_of(questions), tmp_path / "a")
        failed, _, _ = ask(source, damaged, task_of(questions), tmp_path / "b")
    assert passed.overrides == failed.overrides


def test_what_is_kept_are_the_answers_that_were_judged_also_of_questions_worded_alike(
    tokenizer: Path, tmp_path: Path
) -> None:
    questions = questions_in(tmp_path)
    rows = [json.loads(line) for line in (questions / "test.jsonl").read_bytes().splitlines()]
    twins = [r | {"question": f"Twin {n // 2}?"} for n, r in enumerate(rows)]
    (questions / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in twins))
    said = iter(range(10**6))

    def unsteady(_: str) -> Reply:
        return f"The answer is ({'ABCDEFGHIJ'[next(said) % 10]}).", "stop"

    with serving(tokenizer, unsteady) as source, serving(tokenizer, unsteady) as quantized:
        before, after, looks = ask(source, quantized, task_of(questions), tmp_path)
        asked = len(source.prompts)
    found = compare(before, after, looks_of(before, task_of(questions)), before.planned)
    assert (len(found.lost), len(found.gained)) == (looks[-1].lost, looks[-1].gained)
    assert asked <= looks[-1].answered, "nothing is asked once it is settled"
