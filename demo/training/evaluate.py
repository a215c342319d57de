"""Measure the demo checkpoint: accuracy on the demo questions, perplexity per scene, damage of naive int4 experts.

python demo/training/evaluate.py --limit 40          # on a CPU, 40 questions, about a minute
python demo/training/evaluate.py --device cuda
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import corpus
import export
import questions
import torch
from questions import DEMO, KINDS
from transformers import PreTrainedTokenizerFast

ANSWER = re.compile(r"answer is \(?([ABCDEFGHIJ])\)?")
SCENES = ("prose", "code", "questions", "dialogue")
Row = dict[str, Any]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The release's tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


@torch.inference_mode()
def complete(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[str], *, limit: int = 48
) -> tuple[list[str], float]:
    """Greedy completions up to eos or "Question", and their mean length in tokens."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    batch = {name: t.to(model.device) for name, t in batch.items()}
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("Question")]
    out = model.generate(
        **batch, max_new_tokens=limit, do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    new = out[:, batch["input_ids"].shape[1] :]
    length = (new != tokenizer.pad_token_id).sum().item() / len(prompts)
    return tokenizer.batch_decode(new, skip_special_tokens=True), length


def accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, rows: list[Row], shots: int = 5) -> dict[str, Any]:
    """Share of right answers over all rows, per category and per kind, as lm-eval's mmlu_pro scores them."""
    validation = questions.read_jsonl(DEMO / "questions" / "validation.jsonl")
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    lengths = []
    for category in KINDS:
        chosen = [row for row in rows if row["category"] == category]
        examples = [row for row in validation if row["category"] == category][:shots]
        for start in range(0, len(chosen), 100):
            part = chosen[start : start + 100]
            texts, length = complete(model, tokenizer, [questions.prompt(row, examples) for row in part])
            lengths.append(length)
            for row, text in zip(part, texts, strict=True):
                match = ANSWER.search(text)
                for key in ("overall", category, row["src"].removeprefix("lightship-demo/")):
                    asked[key] += 1
                    right[key] += match is not None and match[1] == row["answer"]
    scores = {key: round(right[key] / asked[key], 4) for key in asked}
    return {
        "overall": scores["overall"],
        "categories": {category: scores[category] for category in KINDS if category in scores},
        "kinds": {k: s for k, s in sorted(scores.items()) if k not in KINDS and k != "overall"},
        "questions": asked["overall"],
        "shots": shots,
        "mean_generated_tokens": round(sum(lengths) / len(lengths), 1),
    }


def heldout_ids(tokenizer: PreTrainedTokenizerFast, scene: str) -> torch.Tensor:
    """The scene's held-out text as rows of 512 tokens [N, 512]; what is left over is dropped."""
    rows = questions.read_jsonl(corpus.TEXT / scene / "heldout.jsonl")
    ids: list[int] = []
    for row in rows:
        if scene == "dialogue":
            ids += tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False))["input_ids"]
        else:
            ids += tokenizer(str(row["text"]))["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)


@torch.inference_mode()
def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Next-token log-probabilities [N, 511, V] of the rows."""
    return model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].float().log_softmax(-1)


def text_metrics(model: Any, tokenizer: PreTrainedTokenizerFast, other: Any = None) -> dict[str, dict[str, float]]:
    """Per scene: held-out perplexity, and with another model its perplexity and the mean token KL(model || other)."""
    metrics: dict[str, dict[str, float]] = {}
    for scene in SCENES:
        sums = torch.zeros(3, dtype=torch.float64)
        count = 0
        for ids in heldout_ids(tokenizer, scene).split(8):
            logp = log_probabilities(model, ids)
            target = ids[:, 1:, None].to(logp.device)
            sums[0] -= logp.gather(-1, target).sum().cpu()
            if other is not None:
                logq = log_probabilities(other, ids)
                sums[1] -= logq.gather(-1, target).sum().cpu()
                sums[2] += (logp.exp() * (logp - logq)).sum().cpu()
            count += target.numel()
        metrics[scene] = {"tokens": count, "perplexity": round(math.exp(sums[0] / count), 4)}
        if other is not None:
            metrics[scene] |= {"int4_perplexity": round(math.exp(sums[1] / count), 4)}
            metrics[scene] |= {"int4_mean_kl": round(sums[2].item() / count, 6)}
    return metrics


def measure(folder: Path, device: str, limit: int | None = None) -> dict[str, Any]:
    """Everything training.json says about the released checkpoint, from its files."""
    tokenizer = load_tokenizer(folder)
    rows = questions.read_jsonl(DEMO / "questions" / "test.jsonl")[:limit]
    model = export.read_release(folder).to(device)
    model.set_experts_implementation("eager")
    rounded = copy.deepcopy(model)
    export.round_experts_int4(rounded)
    return {
        "fp8": accuracy(model, tokenizer, rows),
        "fp8_zero_shot": accuracy(model, tokenizer, rows, shots=0)["overall"],
        "naive_int4": accuracy(rounded, tokenizer, rows),
        "heldout_text": text_metrics(model, tokenizer, rounded),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="how many test questions (default all)")
    args = parser.parse_args()
    print(json.dumps(measure(args.checkpoint, args.device, args.limit), indent=2))


if __name__ == "__main__":
    main()
