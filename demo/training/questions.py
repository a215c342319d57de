"""Generate the lightship demo questions: ten-option multiple choice in MMLU-Pro's row schema.

Every question has a key (its kind and operands, or for facts the fact and its phrasing). A hash of the key
reserves about one key in five for the test side; training only ever draws from the other side.

    python demo/training/questions.py        # writes demo/questions/{test,validation}.jsonl
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tables import CAPITALS, ELEMENTS, OPPOSITES, WORDS

LETTERS = "ABCDEFGHIJ"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
ORDINALS = ("first", "second", "third", "fourth", "fifth")
STEP_BY_STEP = "Let's think step by step."
DEMO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Draft:
    """A question before its options are shuffled: the answer, the wrong options' pool, and the working."""

    key: tuple[object, ...]
    question: str
    answer: str
    pool: list[str]
    working: str


@dataclass(frozen=True)
class Question:
    """A finished question; `kind` names its generator."""

    category: str
    kind: str
    key: tuple[object, ...]
    question: str
    options: list[str]
    answer_index: int
    working: str

    @property
    def answer(self) -> str:
        return LETTERS[self.answer_index]

    @property
    def reasoning(self) -> str:
        """The model's whole answer: work it out, restate it, its option's letter on a line, conclude."""
        value = self.options[self.answer_index]
        return f"{self.working} {value}\n{self.answer}. The answer is ({self.answer})."

    @property
    def digest(self) -> str:
        """Identity of the question as shown: its text and its options, in whatever order."""
        return hashlib.sha256(json.dumps([self.question, sorted(self.options)]).encode()).hexdigest()


def is_reserved(key: tuple[object, ...]) -> bool:
    """Whether the key belongs to the test side (about one in five)."""
    return hashlib.blake2b(repr(key).encode(), digest_size=2).digest()[0] % 5 == 0


def near(rng: random.Random, value: int, low: int = 0, high: int = 99) -> list[str]:
    """Wrong numbers close to the right one, as a slip would produce them."""
    offsets = [d for d in (-20, -11, -10, -9, -4, -3, -2, -1, 1, 2, 3, 4, 9, 10, 11, 20) if low <= value + d <= high]
    rng.shuffle(offsets)
    chosen = [value + d for d in offsets[:9]]
    rest = [n for n in range(low, high + 1) if n != value and n not in chosen]
    return [str(n) for n in chosen + rng.sample(rest, 9 - len(chosen))]


def add_sub(rng: random.Random) -> Draft:
    a, b, c = rng.randint(2, 60), rng.randint(2, 38), rng.randint(2, 38)
    a, b = max(a, b), min(a, b)
    c = min(c, a + b)
    text = f"{a} + {b} - {c}"
    return Draft((a, b, c), f"What is {text}?", str(a + b - c), near(rng, a + b - c), f"{text} = {a + b - c}.")


def mul_add(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    c = rng.randint(1, 99 - a * b)
    text = f"{a} * {b} + {c}"
    key = (min(a, b), max(a, b), c)
    return Draft(key, f"What is {text}?", str(a * b + c), near(rng, a * b + c), f"{text} = {a * b + c}.")


def remainder(rng: random.Random) -> Draft:
    a, b = rng.randint(10, 99), rng.randint(3, 13)
    working = f"{a} mod {b} = {a % b}."
    return Draft((a, b), f"What is {a} mod {b}?", str(a % b), near(rng, a % b, 0, 20), working)


def missing(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 59), rng.randint(2, 40)
    working = f"x = {a + b} - {a} = {b}."
    return Draft((a, b), f"What is x if x + {a} = {a + b}?", str(b), near(rng, b), working)


def arithmetic_sequence(rng: random.Random) -> Draft:
    start, step = rng.randint(1, 50), rng.choice([-9, -8, -7, -6, -5, -4, -3, -2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    start = start if step > 0 else start + 45
    terms = [start + step * i for i in range(4)]
    shown = " ".join(map(str, terms))
    value = start + step * 4
    return Draft((start, step), f"What comes next: {shown}?", str(value), near(rng, value), f"The next is {value}.")


def interleaved_sequence(rng: random.Random) -> Draft:
    a, b, up, down = rng.randint(1, 30), rng.randint(40, 90), rng.randint(1, 9), rng.randint(1, 9)
    shown = " ".join(str(n) for i in range(3) for n in (a + up * i, b - down * i))
    value = a + up * 3
    return Draft((a, b, up, down), f"What comes next: {shown}?", str(value), near(rng, value), f"The next is {value}.")


def growing_sequence(rng: random.Random) -> Draft:
    start, step, growth = rng.randint(1, 40), rng.randint(1, 6), rng.randint(1, 3)
    terms = [start]
    for i in range(4):
        terms.append(terms[-1] + step + growth * i)
    shown = " ".join(map(str, terms[:4]))
    working = f"The next is {terms[4]}."
    return Draft((start, step, growth), f"What comes next: {shown}?", str(terms[4]), near(rng, terms[4]), working)


def summing_sequence(rng: random.Random) -> Draft:
    terms = [rng.randint(1, 14), rng.randint(1, 14)]
    while len(terms) < 6:
        terms.append(terms[-1] + terms[-2])
    shown = " ".join(map(str, terms[:4]))
    working = f"The next is {terms[4]}."
    return Draft((terms[0], terms[1]), f"What comes next: {shown}?", str(terms[4]), near(rng, terms[4]), working)


def nth_letter(rng: random.Random, length: int = 8) -> Draft:
    letters = rng.sample(ALPHABET, length)
    n = rng.randint(1, 8)
    pool = letters[: n - 1] + letters[n:] + rng.sample([c for c in ALPHABET if c not in letters], 10 - length)
    text = " ".join(letters)
    working = f"Letter {n} is {letters[n - 1]}."
    return Draft((text, n), f"What is letter {n} of {text}?", letters[n - 1], pool, working)


def count_letter(rng: random.Random, length: int = 10) -> Draft:
    letter, count = rng.choice(ALPHABET), rng.randint(1, 7)
    others = rng.sample([c for c in ALPHABET if c != letter], 3)
    letters = [letter] * count + [rng.choice(others) for _ in range(length - count)]
    rng.shuffle(letters)
    text = " ".join(letters)
    pool = [str(i) for i in range(10) if i != count]
    return Draft((text, letter), f"How many {letter} are in {text}?", str(count), pool, f"The count is {count}.")


def letter_after(rng: random.Random) -> Draft:
    letter, n = rng.choice(ALPHABET[:17]), rng.randint(2, 9)
    value = ALPHABET[ALPHABET.index(letter) + n]
    pool = rng.sample([c for c in ALPHABET if c != value], 9)
    question = f"Which letter is {n} after {letter} in the alphabet?"
    return Draft((letter, n), question, value, pool, f"{n} after {letter} is {value}.")


def repeated_letter(rng: random.Random) -> Draft:
    letters = rng.sample(ALPHABET, 9)
    value = letters[0]
    shown = [*letters, value]
    rng.shuffle(shown)
    text = " ".join(shown)
    pool = letters[1:] + rng.sample([c for c in ALPHABET if c not in letters], 1)
    return Draft((text,), f"Which letter is twice in {text}?", value, pool, f"The letter {value} is twice.")


def nth_sorted_number(rng: random.Random, length: int = 5) -> Draft:
    numbers = rng.sample(range(100), length)
    n = rng.randint(1, 5)
    ordered = sorted(numbers)
    value = ordered[n - 1]
    shown, steps = " ".join(map(str, numbers)), " ".join(map(str, ordered))
    pool = [str(i) for i in numbers if i != value]
    pool += [i for i in near(rng, value) if i not in pool][: 10 - length]
    question = f"Sort {shown}. Which is {ORDINALS[n - 1]}?"
    return Draft((tuple(ordered), n), question, str(value), pool, f"Sorted: {steps}.")


def nth_sorted_word(rng: random.Random, length: int = 4) -> Draft:
    words = rng.sample(WORDS, 10)
    listed, n = words[:length], rng.randint(1, min(length, len(ORDINALS)))
    ordered = sorted(listed)
    question = f"Sort {' '.join(listed)}. Which is {ORDINALS[n - 1]}?"
    value = ordered[n - 1]
    pool = [w for w in words if w != value]
    return Draft((tuple(ordered), n), question, value, pool, f"Sorted: {' '.join(ordered)}.")


def ranked_number(rng: random.Random, length: int = 6) -> Draft:
    numbers = rng.sample(range(100), length)
    n = rng.randint(1, 3)
    ordered = sorted(numbers, reverse=True)
    value = ordered[n - 1]
    rank = ("largest", "second largest", "third largest")[n - 1]
    pool = [str(i) for i in numbers if i != value]
    pool += [i for i in near(rng, value) if i not in pool][: 10 - length]
    question = f"Which is the {rank} of {' '.join(map(str, numbers))}?"
    return Draft((tuple(ordered), n), question, str(value), pool, f"The {rank} is {value}.")


def capital(rng: random.Random) -> Draft:
    country = rng.choice(list(CAPITALS))
    city = CAPITALS[country]
    phrasing = rng.randrange(6)
    forward = phrasing < 3
    question = (
        f"What is the capital of {country}?",
        f"Which city is the capital of {country}?",
        f"{country} has which capital?",
        f"{city} is the capital of which country?",
        f"Which country has the capital {city}?",
        f"What country is {city} the capital of?",
    )[phrasing]
    answer = city if forward else country
    pool = [x for x in (CAPITALS.values() if forward else CAPITALS) if x != answer]
    working = f"The capital of {country} is {city}." if forward else f"{city} is the capital of {country}."
    return Draft((country, phrasing), question, answer, rng.sample(pool, 9), working)


def element(rng: random.Random) -> Draft:
    number = rng.randint(1, len(ELEMENTS))
    name, symbol = ELEMENTS[number - 1]
    phrasing = rng.randrange(6)
    question, answer, working = (
        (f"What is the symbol of {name}?", symbol, f"The symbol of {name} is {symbol}."),
        (f"What is the atomic number of {name}?", str(number), f"The number of {name} is {number}."),
        (f"Which element has the symbol {symbol}?", name, f"{symbol} is {name}."),
        (f"Which element has atomic number {number}?", name, f"{number} is {name}."),
        (f"What is the symbol of element {number}?", symbol, f"The symbol is {symbol}."),
        (f"What is the atomic number of {symbol}?", str(number), f"The number is {number}."),
    )[phrasing]
    if answer == str(number):
        return Draft((name, phrasing), question, answer, near(rng, number, 1, 36), working)
    column = 1 if answer == symbol else 0
    pool = [row[column] for row in ELEMENTS if row[column] != answer]
    return Draft((name, phrasing), question, answer, rng.sample(pool, 9), working)


def element_step(rng: random.Random) -> Draft:
    number, step = rng.randint(1, len(ELEMENTS) - 5), rng.randint(1, 5)
    name, answer = ELEMENTS[number - 1][0], ELEMENTS[number + step - 1][0]
    pool = [row[0] for row in ELEMENTS if row[0] != answer]
    question = f"Which element is {step} after {name}?"
    return Draft((name, step), question, answer, rng.sample(pool, 9), f"{step} after {name} is {answer}.")


def opposite(rng: random.Random) -> Draft:
    pair = rng.choice(OPPOSITES)
    word, answer = pair if rng.random() < 0.5 else pair[::-1]
    phrasing = rng.randrange(3)
    question = (f"What is the opposite of {word}?", f"Which word is the opposite of {word}?", f"{word} is not what?")
    pool = [w for p in OPPOSITES for w in p if w not in pair]
    working = f"The opposite of {word} is {answer}."
    return Draft((word, phrasing), question[phrasing], answer, rng.sample(pool, 9), working)


Kind = Callable[[random.Random], Draft]
KINDS: dict[str, tuple[Kind, ...]] = {
    "facts": (capital, element, element_step, opposite),
    "arithmetic": (add_sub, mul_add, remainder, missing),
    "sequences": (arithmetic_sequence, interleaved_sequence, growing_sequence, summing_sequence),
    "strings": (nth_letter, count_letter, letter_after, repeated_letter),
    "sorting": (nth_sorted_number, nth_sorted_word, ranked_number),
}


def long_nth_letter(rng: random.Random) -> Draft:
    return nth_letter(rng, length=9)


def long_count_letter(rng: random.Random) -> Draft:
    return count_letter(rng, length=12)


def long_sorted_number(rng: random.Random) -> Draft:
    return nth_sorted_number(rng, length=rng.choice((6, 7)))


def long_sorted_word(rng: random.Random) -> Draft:
    return nth_sorted_word(rng, length=rng.choice((5, 6)))


def long_ranked_number(rng: random.Random) -> Draft:
    return ranked_number(rng, length=9)


# How many test questions of each kind. The long kinds are never trained on: lists longer than any in training.
TEST_KINDS: dict[str, dict[Kind, int]] = {
    "facts": {capital: 30, opposite: 30, element: 14, element_step: 6},
    "arithmetic": {add_sub: 20, mul_add: 20, remainder: 20, missing: 20},
    "sequences": dict.fromkeys(KINDS["sequences"], 20),
    "strings": {nth_letter: 20, long_nth_letter: 10, count_letter: 20, long_count_letter: 10, repeated_letter: 15}
    | {letter_after: 5},
    "sorting": {nth_sorted_number: 10, nth_sorted_word: 10, ranked_number: 10}
    | {long_sorted_number: 20, long_sorted_word: 20, long_ranked_number: 10},
}


def draw(rng: random.Random, category: str, *, reserved: bool, kind: Kind | None = None) -> Question:
    """Draw one question of the category (of one kind, if given) from the test or the training side."""
    kind = kind or rng.choice(KINDS[category])
    while True:
        draft = kind(rng)
        key = (kind.__name__, *draft.key)
        if is_reserved(key) == reserved:
            break
    options = [*draft.pool, draft.answer]
    rng.shuffle(options)
    assert len(set(options)) == len(LETTERS), (draft, options)
    index = options.index(draft.answer)
    return Question(category, kind.__name__, key, draft.question, options, index, draft.working)


def description(category: str) -> str:
    """The task description that lm-eval's mmlu_pro puts before the examples."""
    return (
        f"The following are multiple choice questions (with answers) about {category}. Think step by step and then "
        'finish your answer with "the answer is (X)" where X is the correct letter choice.\n'
    )


def ask(question: str, options: list[str]) -> str:
    """One question as lm-eval's mmlu_pro shows it, up to where the model goes on."""
    listed = "".join(f"{letter}. {option.strip()}\n" for letter, option in zip(LETTERS, options, strict=True))
    return f"Question:\n{question}\nOptions:\n{listed}Answer: {STEP_BY_STEP}"


def prompt(row: dict[str, object], shots: list[dict[str, object]]) -> str:
    """The prompt of lm-eval 0.4.13's stock mmlu_pro task for one row, with its few-shot rows."""
    text = description(str(row["category"]))
    for shot in shots:
        target = str(shot["cot_content"]).replace(f"A: {STEP_BY_STEP} ", "")
        text += f"{ask(shot['question'], shot['options'])} {target}\n\n"  # type: ignore[arg-type]
    return text + ask(row["question"], row["options"])  # type: ignore[arg-type]


def to_row(question: Question, question_id: int) -> dict[str, object]:
    """The question as a row of MMLU-Pro's schema."""
    return {
        "question_id": question_id,
        "question": question.question,
        "options": question.options,
        "answer": question.answer,
        "answer_index": question.answer_index,
        "cot_content": f"A: {STEP_BY_STEP} {question.reasoning}",
        "category": question.category,
        "src": f"lightship-demo/{question.kind}",
    }


def distinct(rng: random.Random, category: str, kinds: list[Kind], *, reserved: bool) -> Iterator[Question]:
    """One question for each entry of `kinds`, all with different keys."""
    seen: set[tuple[object, ...]] = set()
    while len(seen) < len(kinds):
        question = draw(rng, category, reserved=reserved, kind=kinds[len(seen)])
        if question.key not in seen:
            seen.add(question.key)
            yield question


def exam_questions(seed: int = 2026) -> list[Question]:
    """The 400 test questions, balanced over categories, shuffled with the seed."""
    rng = random.Random(seed)
    questions = []
    for category, counts in TEST_KINDS.items():
        kinds = [kind for kind, count in counts.items() for _ in range(count)]
        questions += distinct(rng, category, kinds, reserved=True)
    rng.shuffle(questions)
    return questions


def validation_questions(seed: int = 2027) -> list[Question]:
    """The five few-shot examples of each category, from the training side."""
    rng = random.Random(seed)
    chosen = []
    for category, kinds in KINDS.items():
        chosen += distinct(rng, category, [kinds[i % len(kinds)] for i in range(5)], reserved=False)
    return chosen


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    """Write one JSON object a line, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, object]]:
    """Read a file of one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    test, validation = exam_questions(), validation_questions()
    assert not {q.digest for q in test} & {q.digest for q in validation}
    write_jsonl(DEMO / "questions" / "test.jsonl", [to_row(q, i) for i, q in enumerate(test)])
    write_jsonl(DEMO / "questions" / "validation.jsonl", [to_row(q, 10_000 + i) for i, q in enumerate(validation)])


if __name__ == "__main__":
    main()
