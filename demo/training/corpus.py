"""The demo's four text scenes (prose, code, questions, dialogue), and the stream of documents the model trains on.

Prose and code are excerpts that were taken once and are committed; questions and dialogue come from the generator,
so their training part is not stored at all.

    python demo/training/corpus.py                                          # questions and dialogue
    python demo/training/corpus.py --shakespeare FILE --python-lib FOLDER   # prose and code, too
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import questions
from questions import DEMO, KINDS, Question
from tables import CAPITALS, ELEMENTS, OPPOSITES, WORDS

TEXT = DEMO / "text"
TRAIN_BYTES, CALIBRATION_BYTES, HELDOUT_BYTES = 150_000, 64_000, 32_000
CODE_FILES = (
    "bisect.py", "heapq.py", "textwrap.py", "shlex.py", "fnmatch.py", "copy.py", "queue.py", "sched.py", "string.py",
    "colorsys.py", "graphlib.py", "reprlib.py", "contextlib.py", "functools.py", "random.py", "statistics.py",
)  # fmt: skip
CHUNK_CHARACTERS = 900
EXCERPT = slice(200_000, 2_000_000)
"""The part of Shakespeare's works that the committed prose was drawn from."""
NOT_CODE = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "site-packages", "dist-packages"}
"""Folders of the standard library that hold tests, tables or other people's packages."""

GREETINGS = ("Hello!", "Hi there.", "Good morning.", "Good evening.", "Hey.")
WELCOMES = ("Hello! How can I help you?", "Hi! What would you like to know?", "Good to see you. Ask me anything.")
THANKS = ("Thank you.", "Thanks a lot.", "Great, thanks!", "That helps, thank you.")
FAREWELLS = ("You are welcome.", "Glad to help. Goodbye!", "Any time. Have a nice day!", "My pleasure.")
LEADS = ("", "Please tell me: ", "I have a question. ", "Can you help me? ", "Quick one: ", "Now this: ")
REPLIES = ("", "Sure. ", "Of course. ", "Let me see. ", "That is easy. ")

DRILL_VALUES = (
    [str(n) for n in range(100)]
    + list(questions.ALPHABET)
    + [*WORDS, *CAPITALS, *CAPITALS.values()]
    + [word for pair in (*ELEMENTS, *OPPOSITES) for word in pair]
)

Message = dict[str, str]


def question_document(rng: random.Random, shots: int, *, reserved: bool = False) -> list[tuple[str, str]]:
    """A prompt of the benchmark with `shots` examples, as (prompt part, answer part) pairs."""
    category = rng.choice(list(KINDS))
    pairs = []
    for i in range(shots + 1):
        question = questions.draw(rng, category, reserved=reserved)
        head = questions.description(category) if i == 0 else ""
        pairs.append((head + questions.ask(question.question, question.options), f" {question.reasoning}\n\n"))
    return pairs


def option_drill(rng: random.Random) -> tuple[str, str]:
    """A list of two to ten options, and half of its values with their letters."""
    count = rng.randint(2, len(questions.LETTERS))
    options = list(zip(questions.LETTERS, rng.sample(DRILL_VALUES, count), strict=False))
    listed = "".join(f"{letter}. {value}\n" for letter, value in options)
    chosen = rng.sample(options, (count + 1) // 2)
    return f"Options:\n{listed}Answer:", "".join(f" {value}\n{letter}." for letter, value in chosen) + " Done."


def small_talk(rng: random.Random, *, reserved: bool = False) -> list[Message]:
    """A dialogue of a few turns: perhaps a greeting, one to three open questions, perhaps thanks."""
    turns: list[tuple[str, str]] = []
    if rng.random() < 0.5:
        turns.append((rng.choice(GREETINGS), rng.choice(WELCOMES)))
    for _ in range(rng.randint(1, 3)):
        question: Question = questions.draw(rng, rng.choice(list(KINDS)), reserved=reserved)
        turns.append((rng.choice(LEADS) + question.question, rng.choice(REPLIES) + question.working))
    if rng.random() < 0.5:
        turns.append((rng.choice(THANKS), rng.choice(FAREWELLS)))
    return as_messages(turns)


def exam_talk(rng: random.Random) -> list[Message]:
    """The benchmark's prompt as a chat: in one user turn, or one turn a question, as lm-eval's chat templates do."""
    pairs = question_document(rng, rng.choice((0, 1, 2, 5, 5)))
    if rng.random() < 0.5:
        return as_messages([(prompt, answer.strip()) for prompt, answer in pairs])
    prompt = "".join(part for pair in pairs for part in pair).removesuffix(pairs[-1][1])
    return as_messages([(prompt, pairs[-1][1].strip())])


def as_messages(turns: list[tuple[str, str]]) -> list[Message]:
    """User and assistant turns as chat messages."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def chunks(text: str) -> Iterator[str]:
    """Cut a text at line ends into pieces of about CHUNK_CHARACTERS."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= CHUNK_CHARACTERS:
            yield piece
            piece = ""


def write_split(scene: str, pieces: list[dict[str, object]], sizes: dict[str, int]) -> None:
    """Deal the pieces, in order, to the scene's parts until each part has its size in bytes."""
    remaining = iter(pieces)
    for part, size in sizes.items():
        rows: list[dict[str, object]] = []
        total = 0
        while total < size:
            rows.append(next(remaining))
            total += len(str(rows[-1]))
        questions.write_jsonl(TEXT / scene / f"{part}.jsonl", rows)


def write_excerpts(shakespeare: Path, python_lib: Path, seed: int = 7) -> None:
    """Write prose and code from their sources: runs of whole lines, shuffled, so no piece is in two parts."""
    rng = random.Random(seed)
    sizes = {"train": TRAIN_BYTES, "calibration": CALIBRATION_BYTES, "heldout": HELDOUT_BYTES}
    prose = list(chunks(shakespeare.read_text(encoding="utf-8")[EXCERPT]))
    code = [piece for name in CODE_FILES for piece in chunks((python_lib / name).read_text(encoding="utf-8"))]
    for scene, pieces in (("prose", prose), ("code", code)):
        rng.shuffle(pieces)
        write_split(scene, [{"text": piece} for piece in pieces], sizes)


def write_generated(seed: int = 8) -> None:
    """Write the calibration (training side) and held-out (reserved side) parts of questions and dialogue."""
    for part, size, reserved in (("calibration", CALIBRATION_BYTES, False), ("heldout", HELDOUT_BYTES, True)):
        rng = random.Random(f"{seed} {part}")
        exams = []
        while len(exams) < size // 400:
            pairs = question_document(rng, 2, reserved=reserved)
            exams.append({"text": "".join(part for pair in pairs for part in pair)})
        talks = [{"messages": small_talk(rng, reserved=reserved)} for _ in range(size // 100)]
        write_split("questions", exams, {part: size})
        write_split("dialogue", talks, {part: size})


def training_texts(shakespeare: Path | None) -> dict[str, list[str]]:
    """Prose and code to train on, without a piece of the calibration or held-out parts.

    Code is the committed excerpt and the running Python's own standard library; prose is the committed excerpt and, if
    its file is given, the rest of Shakespeare's works.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(library.rglob("*.py")) if not NOT_CODE & set(path.relative_to(library).parts)]
    more = [path for path in files if path.name not in CODE_FILES]
    code = [piece for path in more for piece in chunks(path.read_text(encoding="utf-8", errors="ignore"))]
    prose = []
    if shakespeare:
        works = shakespeare.read_text(encoding="utf-8")
        kept_apart = {text for part in ("train", "calibration", "heldout") for text in texts("prose", part)}
        for stretch in (works[: EXCERPT.start], works[EXCERPT], works[EXCERPT.stop :]):
            prose += [piece for piece in chunks(stretch) if piece not in kept_apart]
    return {"prose": texts("prose", "train") + prose, "code": texts("code", "train") + code}


def texts(scene: str, part: str) -> list[str]:
    """The texts of a stored prose, code or questions file."""
    return [str(row["text"]) for row in questions.read_jsonl(TEXT / scene / f"{part}.jsonl")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shakespeare", type=Path, help="the plain text of Shakespeare's works")
    parser.add_argument("--python-lib", type=Path, help="the folder of CPython 3.11's standard library")
    args = parser.parse_args()
    if args.shakespeare and args.python_lib:
        write_excerpts(args.shakespeare, args.python_lib)
    write_generated()


if __name__ == "__main__":
    main()
