"""Small question directories in MMLU-Pro's schema."""

import json
from pathlib import Path
from typing import Any


def row(question_id: int, category: str, answer: str = "B") -> dict[str, Any]:
    """One row in MMLU-Pro's schema."""
    return {
        "question_id": question_id,
        "question": f"Which letter belongs to {category} number {question_id}? Ünïcode too.",
        "options": ["one", " two ", "three", "four"],
        "answer": answer,
        "answer_index": "ABCD".index(answer),
        "cot_content": f"A: Let's think step by step. It is two. The answer is ({answer}).",
        "category": category,
        "src": "test",
    }


def write_questions(folder: Path, counts: dict[str, int], examples: int = 6) -> Path:
    """Write `counts` test rows and `examples` validation rows a category; answers cycle through A to D."""
    folder.mkdir(parents=True, exist_ok=True)
    categories = [c for c, n in counts.items() for _ in range(n)]
    test = [row(i, c, "ABCD"[i % 4]) for i, c in enumerate(categories)]
    validation = [row(10_000 + i, c, "ABCD"[i % 4]) for i, c in enumerate(c for c in counts for _ in range(examples))]
    for name, rows in (("test", test), ("validation", validation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder
