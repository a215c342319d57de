"""Questions in MMLU-Pro's schema: read a directory of them, and draw the same subset for every model.

    python -c "from pathlib import Path; from lightship.eval.questions import read_questions; \
               print(read_questions(Path('demo/questions')).counts())"
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lightship.errors import EvaluationError
from lightship.files import digest_of

FEWSHOT = 5
"""Worked examples in each prompt: the stock mmlu_pro task's number."""


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
    """Read `test.jsonl` and `validation.jsonl`.

    Raises:
        EvaluationError: a file is missing or empty, a row is not in MMLU-Pro's schema, a question_id appears twice, or
        a
            category has fewer than five validation rows.
    """
    questions = Questions(_read(folder / "test.jsonl"), _read(folder / "validation.jsonl"))
    twice = [i for i, n in Counter(str(q.question_id) for q in questions.test).items() if n > 1]
    if twice:
        raise EvaluationError(
            f"{folder / 'test.jsonl'} has question_id {twice[0]!r} more than once; models are compared question by "
            "question, so every id must be unique"
        )
    examples = Counter(q.category for q in questions.validation)
    for category in questions.counts():
        if examples[category] < FEWSHOT:
            raise EvaluationError(
                f"{folder / 'validation.jsonl'} has {examples[category]} rows of category {category!r}; every category "
                f"of test.jsonl needs {FEWSHOT}, the worked examples of its prompts"
            )
    return questions


def draw(questions: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """Draw `limit` questions, each category by its share (largest remainder); all of them if `limit` is None.

    The draw depends on the questions, `limit` and `seed` only, and a larger limit keeps what a smaller one drew, but
    for a question a category that rounding moves.
    """
    if limit is None or limit >= len(questions):
        return list(questions)
    by_category: dict[str, list[Question]] = defaultdict(list)
    for q in questions:
        by_category[q.category].append(q)
    shares = {c: limit * len(of) / len(questions) for c, of in by_category.items()}
    quotas = {c: int(share) for c, share in shares.items()}
    largest_remainders = sorted(shares, key=lambda c: (quotas[c] - shares[c], c))
    for c in largest_remainders[: limit - sum(quotas.values())]:
        quotas[c] += 1
    drawn = {
        q.question_id
        for c, of in by_category.items()
        for q in random.Random(f"{seed} {c}").sample(of, len(of))[: quotas[c]]
    }
    return [q for q in questions if q.question_id in drawn]


def _read(path: Path) -> list[Question]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise EvaluationError(
            f"the question file {path} does not exist; the recipe's accuracy.questions names a directory with "
            "test.jsonl "
            "and validation.jsonl"
        ) from None
    rows = [_decode(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise EvaluationError(
            f"the question file {path} is empty; it needs one JSON object a line, in MMLU-Pro's schema"
        )
    return rows


def _decode(line: bytes, where: str) -> Question:
    try:
        return msgspec.json.decode(line, type=Question)
    except msgspec.DecodeError as error:
        raise EvaluationError(f"{where} is not a question in MMLU-Pro's schema: {error}") from error
