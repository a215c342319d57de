"""lm-eval's tasks: the stock mmlu_pro with our questions in it, and any other by its name.

    python -c "from lightship.eval.tasks import load_task; from lightship.recipe import TaskSource; \
               print(load_task(TaskSource(name='gsm8k', path='data/gsm8k'), seed=0))"

Of MMLU-Pro, prompts, filter and metric are the stock task's; only where the questions come from, the word for the
category and the task's name are ours. Of other tasks nothing is changed but the data's place, if the recipe names one.
"""

import difflib
import logging
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from lightship.errors import EvaluationError
from lightship.eval.questions import Questions, draw_evenly, hub_error
from lightship.recipe import HUB_NAME, AccuracyTask, TaskSource
from lightship.splits import all_splits, digest_of_splits, read_split

log = logging.getLogger("lm_eval")

STOCK_CATEGORY = "biology"
"""The stock task whose YAML is the template of ours; the fourteen differ only in this word."""
STOCK_MAX_TOKENS = 2048
DEFAULT_MAX_TOKENS = 256
"""What lm-eval generates at most for a task that says nothing about it."""
MOST_NAMED = 5
TEXT_TASKS = ("generate_until",)
"""The kinds of task that the chat API can answer: it gives no log-probabilities of a prompt."""


@dataclass(frozen=True)
class LoadedTask:
    """A further task, ready to be asked."""

    name: str
    leaves: dict[str, Any]
    """lm-eval's tasks by name: one, or those of a group."""
    groups: dict[str, Any] = field(default_factory=dict)
    group_map: dict[str, list[str]] = field(default_factory=dict)
    documents: dict[str, list[int]] | None = None
    """Of each leaf, those that are asked; all if None."""
    overrides: dict[str, str] = field(default_factory=dict)

    @property
    def as_lm_eval_has_it(self) -> dict[str, Any]:
        return {"tasks": self.leaves, "groups": self.groups, "group_map": self.group_map}


def mmlu_pro_tasks(name: str, questions: Questions, max_tokens: int) -> dict[str, Any]:
    """lm-eval tasks by name, one a category: the stock task's configuration with our questions in it.

    Raises:
        EvaluationError: the questions would pass for MMLU-Pro and are not, or not all of it.
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


def check_subjects(name: str, questions: Questions) -> None:
    """Refuse questions that are called MMLU-Pro and lack one of its fourteen subjects.

    Raises:
        EvaluationError: names the missing subjects.
    """
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu_pro"
    stock = {path.stem.removeprefix("mmlu_pro_").replace("_", " ") for path in folder.glob("mmlu_pro_*.yaml")}
    here = set(questions.counts())
    missing = sorted(stock - here)
    if name == HUB_NAME and missing and not here - stock:
        raise EvaluationError(
            f"the questions named {name!r} have none about {', '.join(missing)}; get all of MMLU-Pro's test split, or "
            "give the recipe's [accuracy] another name"
        )


def load_task(source: TaskSource, seed: int, settings: AccuracyTask | None = None) -> LoadedTask:
    """A task by lm-eval's name for it, or a group or a tag of tasks.

    Args:
        seed: of the draw, if the recipe limits it.
        settings: how it will be asked; of a reasoning model, the least number of tokens that it may generate.

    Raises:
        EvaluationError: lm-eval has no such task, it needs a package or the Hub and there is none, its local data
            cannot be used, it runs code that the model wrote, or the chat API cannot answer it.
    """
    try:
        loaded = _load_local(source) if source.path is not None else _load_stock(source)
    except ImportError as error:
        raise EvaluationError(
            f"the task {source.name!r} needs the package {error.name}: pip install {error.name}"
        ) from error
    for name, leaf in loaded.leaves.items():
        if getattr(leaf, "UNSAFE_CODE", False):
            raise EvaluationError(f"the task {name!r} runs code that the model wrote, which lightship does not do")
        if settings and settings.api == "chat" and leaf.OUTPUT_TYPE not in TEXT_TASKS:
            raise EvaluationError(
                f"the task {name!r} compares log-probabilities, which the chat API does not give; use "
                'api = "completions", or a task that reads the text of an answer'
            )
        leaf.set_fewshot_seed(seed)
    overrides = dict(loaded.overrides)
    if settings and settings.reasoning:
        overrides |= _give_room(loaded.leaves, settings.max_tokens)
    sizes = {name: len(leaf.eval_docs) for name, leaf in loaded.leaves.items()}
    documents = None
    if source.limit is not None and source.limit < sum(sizes.values()):
        documents = {name: drawn for name, drawn in draw_evenly(sizes, source.limit, seed).items() if drawn}
        overrides["limit"] = f"{source.limit} of {sum(sizes.values())}, seed {seed}"
    leaves = {name: leaf for name, leaf in loaded.leaves.items() if documents is None or name in documents}
    # A group's mean needs all of its tasks; of some of them, lm-eval cannot make one.
    whole = len(leaves) == len(loaded.leaves)
    groups = (loaded.groups, loaded.group_map) if whole else ({}, {})
    return LoadedTask(source.name, leaves, *groups, documents, overrides)


def check_tasks(settings: AccuracyTask) -> None:
    """Refuse further tasks that could not be asked, before hours are spent on what comes first.

    Raises:
        EvaluationError: as `load_task`.
    """
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        for source in settings.task_sources:
            load_task(source, settings.seed, settings)
    finally:
        log.setLevel(level)


def _give_room(leaves: dict[str, Any], max_tokens: int) -> dict[str, str]:
    """Let tasks whose own limit is smaller generate `max_tokens`."""
    raised = [leaf for leaf in leaves.values() if leaf.OUTPUT_TYPE in TEXT_TASKS]
    for leaf in raised:
        own = leaf.config.generation_kwargs or {}
        room = max(max_tokens, own.get("max_gen_toks", DEFAULT_MAX_TOKENS))
        leaf.config.generation_kwargs = own | {"max_gen_toks": room}
    return {"max_gen_toks": f"{max_tokens} or more"} if raised else {}


def _load_stock(source: TaskSource) -> LoadedTask:
    manager = _manager()
    _check_name(source.name)
    try:
        found = manager.load([source.name])
    except ImportError:
        raise
    except Exception as error:  # datasets raises another class for each thing that can go wrong
        raise hub_error(f"the data of the task {source.name!r}", error) from error
    return LoadedTask(source.name, found["tasks"], found.get("groups", {}), found.get("group_map", {}))


def _load_local(source: TaskSource) -> LoadedTask:
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    assert source.path is not None
    _check_name(source.name)
    entry = _manager().task_index[source.name]
    config = load_yaml(entry.yaml_path) if entry.yaml_path else {}
    if not isinstance(config.get("task"), str):
        raise EvaluationError(f"{source.name!r} is a group of tasks; a local path can be given for a single task only")
    folder = Path(source.path)
    names = all_splits(folder)
    wanted = {str(config[k]) for k in ("test_split", "validation_split", "fewshot_split") if config.get(k)}
    if not wanted & set(names) or config.get("fewshot_split") not in (None, *names):
        raise EvaluationError(
            f"the task {source.name!r} reads the splits {', '.join(sorted(wanted))}, and {folder} has "
            f"{', '.join(names)}; name its files so"
        )
    splits = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([row for _, row in read_split(folder, name)]) for name in names}
    )
    try:
        task = ConfigurableTask(config=config | {"custom_dataset": lambda **_: splits, "dataset_kwargs": None})
    except ImportError:
        raise
    except Exception as error:  # whatever a task's own functions raise on rows that are not as it expects them
        raise EvaluationError(
            f"the rows of {folder} are not those of the task {source.name!r} ({type(error).__name__}: {error}); they "
            f"have the columns {', '.join(splits[names[0]].column_names)}"
        ) from error
    return LoadedTask(
        source.name,
        {source.name: task},
        overrides={"dataset": f"{folder.name} sha256:{digest_of_splits(folder, names)}"},
    )


@cache
def _manager() -> Any:
    """lm-eval's index of all of its tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_name(name: str) -> None:
    known = _manager().all_tasks
    if name not in known:
        near = difflib.get_close_matches(name, known, MOST_NAMED, cutoff=0.5)
        raise EvaluationError(
            f"lm-eval has no task {name!r}; the nearest are {', '.join(near) or 'none'}; `lm-eval ls tasks` lists all"
        )
