"""Accuracy by lm-eval: the stock mmlu_pro task's prompts, filter and metric, and any other task that the recipe names.

    lightship evaluate http://127.0.0.1:8000 --tokenizer demo/checkpoint --recipe recipes/demo.toml

The questions are a directory's, or the Hub's. Every answer is in `work/answers.jsonl` as soon as it is given, so that
the same command goes on after an interruption and asks only what is missing. lm-eval's own log is
`work/lm-eval.log`.
"""

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import msgspec

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.answer_log import AnswerLog
from lightship.eval.asking import AskedText, asking_model, prompt_digest
from lightship.eval.questions import Question, Questions, draw, load_questions, read_questions
from lightship.eval.sending import identify_served
from lightship.eval.tasks import STOCK_MAX_TOKENS, LoadedTask, check_subjects, load_task, mmlu_pro_tasks
from lightship.files import digest_of
from lightship.recipe import AccuracyTask
from lightship.records import Accuracy, AnsweredQuestion, TaskResult, TaskSample

log = logging.getLogger("lm_eval")

ANSWERS = "answers.jsonl"
INVALID = "[invalid]"
"""What lm-eval's regex filter says where it finds nothing."""


def evaluate(
    endpoint: Endpoint,
    task: AccuracyTask,
    work: Path,
    only: Collection[int | str] | None = None,
    *,
    fresh: bool = False,
) -> Accuracy:
    """Ask the questions and keep every answer.

    Args:
        work: a directory for the answers and lm-eval's log. Answers that it holds of the same model to the same
            requests are not asked for again.
        only: ids of those of the task's questions to ask; all if absent.
        fresh: forget the answers that `work` holds.

    Raises:
        EvaluationError: the questions or a further task cannot be used, the endpoint does not answer or does not serve
            the model, it refuses a request, or one failed several times.
    """
    started = time.monotonic()
    name = task.task_name
    questions = all_questions(task)
    check_subjects(name, questions)
    drawn = draw(questions.test, task.limit, task.seed)
    asked = Questions([q for q in drawn if only is None or q.question_id in only], questions.validation)
    served = identify_served(endpoint)
    work.mkdir(parents=True, exist_ok=True)
    with _quiet_lm_eval(work / "lm-eval.log"), AnswerLog.open(work / ANSWERS, fresh=fresh) as answers:
        tasks = mmlu_pro_tasks(name, asked, task.max_tokens)
        more = [load_task(source, task.seed, task) for source in task.task_sources]
        model = asking_model(endpoint, task, answers, served)
        result = _run(model, task, {"tasks": tasks, "groups": {}, "group_map": {}}) if tasks else {}
        order = {str(q.question_id): i for i, q in enumerate(asked.test)}
        answered = [_answered(sample) for task_name in tasks for sample in result["samples"][task_name]]
        return Accuracy(
            task=name,
            answers=sorted(answered, key=lambda a: order[a.question_id]),
            overrides=_overrides(task, questions, len(drawn)),
            tasks=[_ask_further(model, task, loaded) for loaded in more],
            planned=None if only is None else len(drawn),
            seconds=time.monotonic() - started,
        )


def all_questions(task: AccuracyTask) -> Questions:
    """The task's directory, or the Hub's MMLU-Pro.

    Raises:
        EvaluationError: they cannot be read.
    """
    return load_questions(task.revision) if task.questions is None else read_questions(Path(task.questions))


def _overrides(task: AccuracyTask, questions: Questions, drawn: int) -> dict[str, str]:
    overrides = {"dataset": f"{task.task_name} sha256:{questions.digest()}"}
    if task.questions is not None:
        overrides["dataset"] = f"{Path(task.questions).name} sha256:{questions.digest()}"
    if task.max_tokens != STOCK_MAX_TOKENS:
        overrides["max_gen_toks"] = str(task.max_tokens)
    if drawn < len(questions.test):
        overrides["limit"] = f"{drawn} of {len(questions.test)}, seed {task.seed}"
    if task.sequential:
        overrides["stages"] = f"asked in stages until settled, seed {task.seed}"
    return overrides | _asking_overrides(task)


def _asking_overrides(task: AccuracyTask) -> dict[str, str]:
    """How every task is asked, where that is not lm-eval's default."""
    overrides = {}
    if task.api == "chat":
        overrides["api"] = "chat, worked examples as turns"
    if task.reasoning:
        overrides["thinking"] = "stripped, stop texts applied after it"
    return overrides


def _run(model: Any, task: AccuracyTask, tasks: dict[str, Any], documents: dict[str, list[int]] | None = None) -> Any:
    """Run lm-eval's `evaluate`, which is its `simple_evaluate` without 3 s spent on describing the machine."""
    from lm_eval.evaluator import evaluate as lm_evaluate

    chat = task.api == "chat"
    return lm_evaluate(
        model, tasks, samples=documents, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat
    )


def _answered(sample: dict[str, Any]) -> AnsweredQuestion:
    question = msgspec.convert(sample["doc"], Question)
    text = sample["resps"][0][0]
    assert isinstance(text, AskedText)
    predicted = sample["filtered_resps"][0]
    return AnsweredQuestion(
        question_id=str(question.question_id),
        category=question.category,
        answer=question.answer,
        predicted=None if predicted == INVALID else predicted,
        correct=bool(sample["exact_match"] == 1.0),
        truncated=text.truncated,
        text=str(text),
        prompt_digest=text.prompt_digest,
    )


def _ask_further(model: Any, task: AccuracyTask, loaded: LoadedTask) -> TaskResult:
    result = _run(model, task, loaded.as_lm_eval_has_it, loaded.documents)
    metrics = {}
    for name, values in result["results"].items():
        prefix = "" if name == loaded.name else f"{name}/"
        for key, value in values.items():
            metric, _, of_filter = key.partition(",")
            if of_filter and not metric.endswith("_stderr") and _is_number(value):
                metrics[f"{prefix}{metric}/{of_filter}"] = float(value)
    if not metrics:
        raise EvaluationError(f"lm-eval gives no number for the task {loaded.name!r}; take it out of the recipe")
    samples = [sample for name in loaded.leaves for sample in _samples(name, result["samples"][name])]
    return TaskResult(
        task=loaded.name, metrics=metrics, samples=samples, overrides=_asking_overrides(task) | loaded.overrides
    )


def _samples(task: str, logged: list[dict[str, Any]]) -> list[TaskSample]:
    """lm-eval logs a document once a filter; a sample of ours has them all."""
    by_document: dict[int, list[dict[str, Any]]] = {}
    for sample in logged:
        by_document.setdefault(sample["doc_id"], []).append(sample)
    return [_sample(task, document, filtered) for document, filtered in sorted(by_document.items())]


def _sample(task: str, document: int, filtered: list[dict[str, Any]]) -> TaskSample:
    first = filtered[0]
    replies = [reply for of_request in first["resps"] for reply in of_request]
    texts = [reply for reply in replies if isinstance(reply, AskedText)]
    prompts = [text.prompt_digest for text in texts] or [prompt_digest(list(a[:2])) for a in first["arguments"]]
    return TaskSample(
        task=task,
        document=document,
        prompt_digest=prompts[0] if len(set(prompts)) == 1 else digest_of(prompts),
        target=str(first["target"]),
        answers=[str(r) if isinstance(r, AskedText) else f"{r[0]:.6g}" for r in replies],
        parsed={s["filter"]: ", ".join(_shown(r) for r in s["filtered_resps"]) for s in filtered},
        metrics={f"{m}/{s['filter']}": float(s[m]) for s in filtered for m in s["metrics"] if _is_number(s[m])},
        truncated=any(text.truncated for text in texts),
    )


def _shown(parsed: Any) -> str:
    return f"{parsed[0]:.6g}" if isinstance(parsed, tuple) else str(parsed)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)


@contextmanager
def _quiet_lm_eval(path: Path) -> Iterator[None]:
    """Send lm-eval's log messages to a file, and show no tqdm bar: ours is the one on the terminal."""
    import tqdm

    before = log.level, log.propagate, tqdm.tqdm.__init__
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    tqdm.tqdm.__init__ = lambda bar, *given, **named: before[2](bar, *given, **named | {"disable": True})
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        log.level, log.propagate, tqdm.tqdm.__init__ = before
