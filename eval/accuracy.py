"""Accuracy by lm-eval: the stock mmlu_pro task's prompts, filter and metric, on a local directory of questions.

    lightship evaluate http://127.0.0.1:8000 --tokenizer demo/checkpoint --recipe recipes/demo.toml

Only where the questions come from, the word for the category and the task's name are ours. The requests go through
lm-eval's `local-completions` model to any OpenAI-compatible server. lm-eval downloads nothing and caches nothing; what
it logs is in `work/lm-eval.log`.
"""

import asyncio
import logging
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any, cast

import msgspec

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.questions import Question, Questions, draw, read_questions
from lightship.progress import tracked
from lightship.recipe import AccuracyTask
from lightship.records import Accuracy, AnsweredQuestion

log = logging.getLogger("lm_eval")

STOCK_CATEGORY = "biology"
"""The stock task whose YAML is the template of ours; the fourteen differ only in this word."""
STOCK_MAX_TOKENS = 2048
REQUEST_SECONDS = 1800
NO_LIMIT = 2**31
"""lm-eval cuts prompts to this many tokens without a word; let the server refuse them instead."""


def evaluate(endpoint: Endpoint, task: AccuracyTask, work: Path) -> Accuracy:
    """Ask the questions and keep every answer.

    Args:
        work: a directory for lm-eval's log.

    Raises:
        EvaluationError: the questions cannot be used, the endpoint does not answer or does not serve the model, or a
            request failed three times.
    """
    started = time.monotonic()
    folder = Path(task.questions)
    name = task.name or folder.name
    questions = read_questions(folder)
    asked = Questions(draw(questions.test, task.limit, task.seed), questions.validation)
    _check_endpoint(endpoint)
    work.mkdir(parents=True, exist_ok=True)
    with _quiet_lm_eval(work / "lm-eval.log"):
        answers = _ask(endpoint, task, build_tasks(name, asked, task.max_tokens), len(asked.test), work)
    order = {str(q.question_id): i for i, q in enumerate(asked.test)}
    overrides = {"dataset": f"{folder.name} sha256:{questions.digest()}"}
    if task.max_tokens != STOCK_MAX_TOKENS:
        overrides["max_gen_toks"] = str(task.max_tokens)
    if len(asked.test) < len(questions.test):
        overrides["limit"] = f"{len(asked.test)} of {len(questions.test)}, seed {task.seed}"
    return Accuracy(
        task=name,
        answers=sorted(answers, key=lambda a: order[a.question_id]),
        overrides=overrides,
        seconds=time.monotonic() - started,
    )


def build_tasks(name: str, questions: Questions, max_tokens: int) -> dict[str, Any]:
    """lm-eval tasks by name, one a category: the stock task's configuration with our questions in it.

    Raises:
        EvaluationError: the questions would pass for MMLU-Pro and are not.
    """
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    stock_folder = Path(lm_eval.tasks.__file__).parent / "mmlu_pro"
    stock = load_yaml(stock_folder / f"mmlu_pro_{STOCK_CATEGORY}.yaml")
    stock_names = {path.stem for path in stock_folder.glob("mmlu_pro_*.yaml")}
    tasks = {}
    for category in questions.counts():
        task_name = f"{name}_{category.replace(' ', '_')}"
        if task_name.startswith("mmlu_pro_") and task_name not in stock_names:
            raise EvaluationError(
                f"the questions' folder is named {name!r} but its category {category!r} is not one of MMLU-Pro's; "
                "rename the folder, so that its result is not taken for MMLU-Pro's"
            )
        splits = datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list([msgspec.to_builtins(q) for q in rows if q.category == category])
                for split, rows in (("test", questions.test), ("validation", questions.validation))
            }
        )
        tasks[task_name] = ConfigurableTask(
            config=stock
            | {
                "task": task_name,
                "task_alias": category,
                "dataset_path": name,
                "custom_dataset": lambda splits=splits, **_: splits,
                "process_docs": None,
                "description": stock["description"].replace(f"about {STOCK_CATEGORY}.", f"about {category}."),
                "generation_kwargs": stock["generation_kwargs"] | {"max_gen_toks": max_tokens},
            }
        )
        tasks[task_name].set_fewshot_seed(0)
    return tasks


def _ask(
    endpoint: Endpoint, task: AccuracyTask, tasks: dict[str, Any], total: int, work: Path
) -> list[AnsweredQuestion]:
    """Run lm-eval's `evaluate`, which is its `simple_evaluate` without 3 s spent on describing the machine."""
    from aiohttp import ClientError
    from lm_eval.evaluator import evaluate as lm_evaluate
    from requests import RequestException

    url = f"{endpoint.base_url.rstrip('/')}/v1/completions"
    bar = cast("Generator[int]", tracked(range(total), f"asking {endpoint.model}"))
    with closing(bar) as progress:
        next(progress)
        model = _recording_model()(
            progress,
            model=endpoint.model,
            base_url=url,
            tokenizer=str(endpoint.tokenizer),
            tokenizer_backend="huggingface",
            num_concurrent=task.concurrency,
            max_length=NO_LIMIT,
            timeout=REQUEST_SECONDS,
        )
        try:
            result = lm_evaluate(model, {"tasks": tasks, "groups": {}, "group_map": {}}, bootstrap_iters=0)
        except (ClientError, RequestException, TimeoutError) as error:
            raise EvaluationError(
                f"{url} failed three times on one request ({str(error) or type(error).__name__}); what the server said "
                f"is in {work / 'lm-eval.log'}"
            ) from error
    return [_answered(sample, model.cut) for name in tasks for sample in result["samples"][name]]


def _recording_model() -> Any:
    """lm-eval's local-completions model, which also notes which texts the server cut, and shows progress."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class RecordingCompletions(LocalCompletionsAPI):  # type: ignore[misc]  # lm-eval is untyped
        def __init__(self, progress: Iterator[int], **arguments: Any) -> None:
            super().__init__(**arguments)
            self.progress = progress
            self.cut: set[str] = set()
            """The texts that ended with finish_reason `length`."""

        async def get_batched_requests(self, *arguments: Any, **settings: Any) -> Any:
            """The first failure is raised; asyncio would print the others on the terminal."""
            asyncio.get_running_loop().set_exception_handler(lambda _, context: log.info("%s", context))
            return await super().get_batched_requests(*arguments, **settings)

        def parse_generations(self, outputs: Any, **_: Any) -> list[str]:
            texts: list[str] = super().parse_generations(outputs=outputs)
            self.cut |= {c["text"] for c in outputs["choices"] if c["finish_reason"] == "length"}
            next(self.progress, None)
            return texts

    return RecordingCompletions


def _answered(sample: dict[str, Any], cut: set[str]) -> AnsweredQuestion:
    question = msgspec.convert(sample["doc"], Question)
    text = sample["resps"][0][0]
    predicted = sample["filtered_resps"][0]
    return AnsweredQuestion(
        question_id=str(question.question_id),
        category=question.category,
        answer=question.answer,
        predicted=None if predicted == "[invalid]" else predicted,
        correct=bool(sample["exact_match"] == 1.0),
        truncated=text in cut,
        text=text,
    )


def _check_endpoint(endpoint: Endpoint) -> None:
    import httpx

    url = f"{endpoint.base_url.rstrip('/')}/v1/models"
    try:
        response = httpx.get(url, timeout=30, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise EvaluationError(f"{url} does not answer ({error}); is the server up? See `lightship serve`") from error
    served = [m["id"] for m in response.json()["data"]]
    if endpoint.model not in served:
        raise EvaluationError(f"{url} serves {', '.join(served)}, not {endpoint.model}")


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
    tqdm.tqdm.__init__ = partialmethod(tqdm.tqdm.__init__, disable=True)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        log.level, log.propagate, tqdm.tqdm.__init__ = before
