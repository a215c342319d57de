"""Questions in MMLU-Pro's schema: read a directory of them, or the Hub's, and draw the same subset for every model.

    python -c "from pathlib import Path; from lightship.eval.questions import read_questions; \
               print(read_questions(Path('demo/questions')).counts())"
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lightship.errors import EvaluationError
from lightship.files import digest_of
from lightship.recipe import HUB_QUESTIONS
from lightship.splits import read_split

FEWSHOT = 5
"""Worked examples in each prompt: the stock mmlu_pro task's number."""
LETTERS = "ABCDEFGHIJ"
"""The stock task shows no option after J, and its filter reads no other letter."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What the stock task's templates read of a row."""

    question_id: int | str
    question: str
    options: list[str]
    answer: str
    cot_content: str
    category: str


@dataclass(frozen=True)
class Questions:
    """The questions to ask and, per category, the worked examples that precede them."""

    test: Sequence[Question]
    validation: Sequence[Question]

    def counts(self) -> dict[str, int]:
        """Category -> questions to ask, by name."""
        return dict(sorted(Counter(q.category for q in self.test).items()))

    def digest(self) -> str:
        """SHA-256 of everything a prompt is built from."""
        return digest_of([self.test, self.validation])


def read_questions(folder: Path) -> Questions:
    """Read the splits `test` and `validation` of a directory: JSON lines or parquet, see `lightship.splits`.

    Raises:
        EvaluationError: a file is missing or empty, a row is not in MMLU-Pro's schema, a question_id appears twice, or
            a category has fewer than five validation rows.
    """
    test, validation = (_questions(read_split(folder, split)) for split in ("test", "validation"))
    return _checked(Questions(test, validation), str(folder))


def load_questions(revision: str | None) -> Questions:
    """MMLU-Pro's questions from the Hugging Face Hub, or from its cache of them.

    Args:
        revision: a commit of the dataset; the newest, or the one in the cache, if absent.

    Raises:
        EvaluationError: the Hub cannot be reached, or its rows are no questions.
    """
    import datasets

    try:
        splits = datasets.load_dataset(HUB_QUESTIONS, revision=revision)
    except Exception as error:  # datasets raises another class for each thing that can go wrong
        raise hub_error(f"the dataset {HUB_QUESTIONS}", error) from error
    test, validation = (
        _questions((f"{HUB_QUESTIONS}, {split}, row {n}", row) for n, row in enumerate(splits[split], start=1))
        for split in ("test", "validation")
    )
    return _checked(Questions(test, validation), HUB_QUESTIONS)


def hub_error(what: str, error: Exception) -> EvaluationError:
    """That something of the Hub cannot be had, and what to do."""
    import huggingface_hub.constants

    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE is set, as lightship does unless you set it to 0" if offline else "the Hub did not give it"
    return EvaluationError(
        f"{what} is not on this machine, and {why} ({type(error).__name__}: {error}); set HF_HUB_OFFLINE=0 where there "
        "is a network, or name a local copy in the recipe's [accuracy]"
    )


def draw(questions: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """Draw `limit` questions, each category by its share; all of them if `limit` is None. See `draw_evenly`."""
    by_category: dict[str, list[int]] = {}
    for n, q in enumerate(questions):
        by_category.setdefault(q.category, []).append(n)
    drawn = draw_evenly({category: len(of) for category, of in by_category.items()}, limit, seed)
    return [questions[n] for n in sorted(by_category[c][i] for c, of in drawn.items() for i in of)]


def draw_evenly(sizes: Mapping[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Name -> which of its items are drawn, in order: each name's share of `limit`, by largest remainder.

    The draw depends on the sizes, `limit` and `seed` only, and a larger limit keeps what a smaller one drew, but for
    an item a name that rounding moves.
    """
    total = sum(sizes.values())
    if limit is None or limit >= total:
        return {name: list(range(size)) for name, size in sizes.items()}
    shares = {name: limit * size / total for name, size in sizes.items()}
    quotas = {name: int(share) for name, share in shares.items()}
    largest_remainders = sorted(shares, key=lambda name: (quotas[name] - shares[name], name))
    for name in largest_remainders[: limit - sum(quotas.values())]:
        quotas[name] += 1
    return {
        name: sorted(random.Random(f"{seed} {name}").sample(range(size), size)[: quotas[name]])
        for name, size in sizes.items()
    }


def _questions(rows: Iterable[tuple[str, dict[str, Any]]]) -> list[Question]:
    return [_question(where, row) for where, row in rows]


def _question(where: str, row: dict[str, Any]) -> Question:
    try:
        question = msgspec.convert(row, Question)
    except msgspec.ValidationError as error:
        raise EvaluationError(f"{where} is not a question in MMLU-Pro's schema: {error}") from error
    if not 1 <= len(question.options) <= len(LETTERS):
        raise EvaluationError(f"{where} has {len(question.options)} options; MMLU-Pro's prompt has room for 1 to 10")
    if len(question.answer) != 1 or question.answer not in LETTERS[: len(question.options)]:
        raise EvaluationError(
            f"{where}: the answer {question.answer!r} is the letter of none of its {len(question.options)} options"
        )
    return question


def _checked(questions: Questions, where: str) -> Questions:
    twice = [i for i, n in Counter(str(q.question_id) for q in questions.test).items() if n > 1]
    if twice:
        raise EvaluationError(
            f"the test questions of {where} have question_id {twice[0]!r} more than once; models are compared question "
            "by question, so every id must be unique"
        )
    examples = Counter(q.category for q in questions.validation)
    for category in questions.counts():
        if examples[category] < FEWSHOT:
            raise EvaluationError(
                f"the validation questions of {where} have {examples[category]} rows of category {category!r}; every "
                f"category of the test questions needs {FEWSHOT}, the worked examples of its prompts"
            )
    return questions
