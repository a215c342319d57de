"""Make demo/text/calibration: seven small scenes that may be redistributed, for releases of real models.

    python demo/training/scenes.py --wordnet data.noun --tang tang300 --python-lib FOLDER --javascript underscore.js

The four sources are named in demo/text/calibration/README.md; reasoning-gym must be installed. The same sources and
seed give the same files.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

from corpus import chunks
from problems import CHINESE, MATHEMATICS, SCIENCE
from questions import DEMO, write_jsonl
from talks import dialogue, tool_use

CALIBRATION = DEMO / "text" / "calibration"
PASSAGES = Path(__file__).parent / "passages"
SCENE_BYTES = 64_000
CODE_FILES = ("dataclasses.py", "difflib.py", "json/decoder.py", "asyncio/queues.py", "concurrent/futures/_base.py",
              "http/cookies.py", "ipaddress.py", "fractions.py")  # fmt: skip
PUZZLES = ("aiw", "knights_knaves", "zebra_puzzles", "syllogism", "family_relationships", "leg_counting",
           "time_intervals", "calendar_arithmetic", "number_sequence", "simple_geometry", "complex_arithmetic",
           "fraction_simplification", "prime_factorization", "course_schedule")  # fmt: skip
COLOURS = re.compile(r"\x1b\[\d*m")

Row = dict[str, object]


def passages(scene: str) -> list[Row]:
    """The passages that were written for lightship."""
    return [{"text": p} for p in (PASSAGES / f"{scene}.txt").read_text(encoding="utf-8").strip().split("\n\n")]


def dictionary(noun_file: Path, rng: random.Random) -> Iterator[Row]:
    """WordNet's nouns as short articles: a word, what it means, and what kinds of it there are."""
    entries = {}
    for line in noun_file.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        data, gloss = line.split(" | ", 1)
        fields = data.split(" ")
        words = [w.replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
        kinds = [fields[i + 1] for i, mark in enumerate(fields) if mark == "~"]
        entries[fields[0]] = (words, gloss.strip(), kinds)
    for key in rng.sample(sorted(entries), len(entries)):
        words, gloss, kinds = entries[key]
        if 4 <= len(kinds) <= 9:
            lines = [f"{', also called '.join(words)}: {gloss}.", f"Kinds of {words[0]}:"]
            lines += [f"- {entries[k][0][0]}: {entries[k][1]}" for k in kinds]
            yield {"text": "\n".join(lines) + "\n"}


def poems(fortunes: Path, rng: random.Random) -> Iterator[Row]:
    """Poems of the Tang dynasty with title and author."""
    texts = COLOURS.sub("", fortunes.read_text(encoding="utf-8")).split("\n%\n")
    for text in rng.sample(texts, len(texts)):
        yield {"text": text.strip() + "\n"}


def code(library: Path, javascript: Path, rng: random.Random) -> list[Row]:
    """Pieces of whole lines of Python and JavaScript."""
    files = [*(library / name for name in CODE_FILES), javascript]
    pieces = [[{"text": p} for p in chunks(f.read_text(encoding="utf-8"))] for f in files]
    return [row for file in pieces for row in rng.sample(file, min(len(file), 9 if file is not pieces[-1] else 25))]


def puzzles(rng: random.Random) -> Iterator[Row]:
    """reasoning-gym's puzzles with their answers."""
    import reasoning_gym

    seed = rng.randrange(2**31)
    for rows in zip(*(reasoning_gym.create_dataset(name, size=40, seed=seed) for name in PUZZLES), strict=True):
        for row in rows:
            yield {"messages": [
                {"role": "user", "content": row["question"]}, {"role": "assistant", "content": str(row["answer"])},
            ]}  # fmt: skip


def worked(generators: tuple, rng: random.Random) -> Iterator[Row]:
    """Problems with their working, by turns as a text and as a question to a model that thinks."""
    while True:
        question, working, answer = rng.choice(generators)(rng)
        yield {"text": f"{question}\n\n{working}\n\n{answer}\n"}
        question, working, answer = rng.choice(generators)(rng)
        yield {"messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "reasoning_content": working, "content": answer},
        ]}  # fmt: skip


def taken(rows: Iterator[Row], size: int) -> list[Row]:
    """Rows until they have `size` bytes."""
    chosen = []
    while size > 0 and (row := next(rows, None)):
        chosen.append(row)
        size -= len(str(row).encode())
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, help="data.noun of WordNet 3.0")
    parser.add_argument("--tang", type=Path, required=True, help="the fortune file tang300")
    parser.add_argument("--python-lib", type=Path, required=True, help="the folder of CPython 3.11's standard library")
    parser.add_argument("--javascript", type=Path, required=True, help="underscore.js of underscore 1.13.8")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    part = SCENE_BYTES // 2
    scenes = {
        "english": passages("english") + taken(dictionary(args.wordnet, rng), SCENE_BYTES - 8000),
        "chinese": passages("chinese") + taken(poems(args.tang, rng), part) + taken(worked(CHINESE, rng), part // 2),
        "code": code(args.python_lib, args.javascript, rng),
        "math": taken(puzzles(rng), part) + taken(worked(MATHEMATICS, rng), part),
        "dialogue": taken(iter(lambda: dialogue(rng), None), SCENE_BYTES),
        "science": passages("science") + taken(worked(SCIENCE, rng), part),
        "tools": taken(iter(lambda: tool_use(rng), None), SCENE_BYTES),
    }
    for scene, rows in scenes.items():
        rng.shuffle(rows)
        write_jsonl(CALIBRATION / f"{scene}.jsonl", rows)


if __name__ == "__main__":
    main()
