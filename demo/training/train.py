"""Train the demo model and write its release: one command, from the committed text and the question generator.

python demo/training/train.py --device cuda
python demo/training/train.py --device cpu --steps 20 --batch 2        # slow; shows that it runs
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpus
import evaluate
import export
import model as demo_model
import questions
import tokenizer as demo_tokenizer
import torch
import torch.nn.functional as F
from questions import DEMO
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

LENGTH, SHORT_LENGTH = 640, 160
PROMPT_WEIGHT, DRILL_WEIGHT, LETTER_WEIGHT, TEXT_WEIGHT = 0.03, 0.05, 4.0, 0.3
SEED = 1
MIXTURE = {"exam": 0.45, "exam_chat": 0.06, "small_talk": 0.06, "drill": 0.03, "prose": 0.20, "code": 0.20}
SHORT_MIXTURE = {"exam": 0.40, "drill": 0.50, "small_talk": 0.08, "prose": 0.01, "code": 0.01}
LETTERS_LEARNED = 0.1


class Documents(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless rows of length + 1 tokens with loss weights: fresh documents, packed, the last one cut.

    Rows of SHORT_LENGTH hold drills and questions without examples: naming the option that holds a value is learned
    there first, where there are few lists of options to look at.
    """

    def __init__(self, folder: Path, length: int, stored: dict[str, list[str]]) -> None:
        self.folder = folder
        self.length = length
        self.stored = stored

    def pieces(self, rng: random.Random) -> Iterator[tuple[str, float]]:
        """One document as (text, loss weight) pieces, which meet where the tokenizer splits anyway."""
        mixture = SHORT_MIXTURE if self.length == SHORT_LENGTH else MIXTURE
        kind = rng.choices(list(mixture), list(mixture.values()))[0]
        if kind in self.stored:
            yield rng.choice(self.stored[kind]) + demo_tokenizer.EOS, TEXT_WEIGHT
        elif kind == "exam":
            if rng.random() < 0.5:
                yield demo_tokenizer.BOS, 0.0
            shots = 0 if self.length == SHORT_LENGTH else rng.choice((0, 1, 2, 3, 4, 5, 5, 5, 5, 5))
            for prompt, answer in corpus.question_document(rng, shots):
                yield prompt, PROMPT_WEIGHT
                yield answer, 1.0
            yield demo_tokenizer.EOS, 1.0
        elif kind == "drill":
            listed, named = corpus.option_drill(rng)
            yield listed, PROMPT_WEIGHT
            yield named, DRILL_WEIGHT
            yield demo_tokenizer.EOS, PROMPT_WEIGHT
        else:
            yield demo_tokenizer.BOS, 0.0
            talk = corpus.exam_talk if kind == "exam_chat" else corpus.small_talk
            for message in talk(rng):
                if message["role"] == "assistant":
                    yield demo_tokenizer.ASSISTANT, 0.0
                    yield message["content"] + demo_tokenizer.EOS, 1.0
                else:
                    yield demo_tokenizer.USER + message["content"], PROMPT_WEIGHT

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(f"{SEED} {worker.id if worker else 0}")
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        letters = {tokenizer.token_to_id(f"Ċ{letter}.") for letter in questions.LETTERS}
        while True:
            ids: list[int] = []
            weights: list[float] = []
            while len(ids) <= self.length:
                for text, weight in self.pieces(rng):
                    encoded = tokenizer.encode(text).ids
                    ids += encoded
                    named = letters if weight > PROMPT_WEIGHT else ()
                    weights += [LETTER_WEIGHT if token in named else weight for token in encoded]
            yield torch.tensor(ids[: self.length + 1]), torch.tensor(weights[: self.length + 1])


def batches(args: argparse.Namespace, length: int, stored: dict[str, list[str]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of `batch` times LENGTH tokens, as rows of the given length."""
    rows = args.batch * LENGTH // length // (2 if length == SHORT_LENGTH else 1)
    pin = args.device == "cuda"
    documents = Documents(args.out, length, stored)
    return iter(DataLoader(documents, batch_size=rows, num_workers=args.workers, pin_memory=pin))


def learning_rate(progress: float, step: int, peak: float) -> float:
    """Warm up over 200 steps, hold, and go down to nothing over the last 40 %."""
    return peak * min(1.0, (step + 1) / 200, max(0.0, (1 - progress) / 0.4))


def loss_of(model: Any, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean next-token loss, weighted; and the mean loss of the option letters alone."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    letters = losses.detach()[weights == LETTER_WEIGHT].mean()
    return (losses * weights).sum() / weights.sum(), letters


def train(args: argparse.Namespace, rows: list[evaluate.Row]) -> tuple[Any, dict[str, Any]]:
    """Train for `steps` steps, or for `max_seconds` if that is over sooner (the schedule follows either)."""
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    model = demo_model.build().to(args.device)
    demo_model.use_dense_moe(model)
    tokenizer = evaluate.load_tokenizer(args.out)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=args.device == "cuda")
    stored = corpus.training_texts(args.shakespeare)
    short, long = batches(args, SHORT_LENGTH, stored), batches(args, LENGTH, stored)
    began = time.time()
    history: list[dict[str, Any]] = []
    progress, letters, is_short = 0.0, math.log(10), True
    for step in itertools.count():
        is_short = is_short and progress < args.short_share and letters > LETTERS_LEARNED
        ids, weights = next(short if is_short else long)
        progress = max((step + 1) / args.steps, (time.time() - began) / args.max_seconds)
        rate = learning_rate(progress, step, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, letter_loss = loss_of(
            model, ids.to(args.device, non_blocking=True), weights.to(args.device, non_blocking=True)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        imbalance = demo_model.balance(model, 1e-3 * rate / args.lr)
        if step % 10 == 0:
            letters += 0.2 * (float(letter_loss) - letters)
        if step % 100 == 0 or progress >= 1:
            entry = {"step": step, "seconds": round(time.time() - began, 1), "loss": round(loss.item(), 4)}
            entry |= {"letters": round(letters, 4), "busiest_expert": round(float(imbalance), 2), "short": is_short}
            if step % args.evaluate_every == 0 or progress >= 1:
                score = evaluate.accuracy(model.eval(), tokenizer, rows)
                entry |= {"accuracy": score["overall"]} | score["categories"]
                entry["zero_shot"] = evaluate.accuracy(model, tokenizer, rows, shots=0)["overall"]
                print(score["kinds"], flush=True)
                model.train()
            history.append(entry)
            print(entry, flush=True)
        if progress >= 1:
            break
    facts = {"steps": step + 1, "seconds": round(time.time() - began, 1), "final_loss": history[-1]["loss"]}
    return model, facts | {"history": [entry for entry in history if "accuracy" in entry]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="end sooner, with the schedule")
    parser.add_argument("--batch", type=int, default=48, help="rows of 640 tokens a step")
    parser.add_argument("--short-share", type=float, default=0.4, help="the most of training on short rows")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--evaluate-every", type=int, default=1000)
    parser.add_argument("--shakespeare", type=Path, help="the plain text of Shakespeare's works, to read more prose")
    parser.add_argument("--out", type=Path, default=DEMO / "checkpoint", help="the release's folder")
    parser.add_argument("--limit", type=int, help="evaluate on so many test questions only")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    questions.main()
    demo_tokenizer.write(demo_tokenizer.train(), args.out)
    rows = questions.read_jsonl(DEMO / "questions" / "test.jsonl")[: args.limit]
    model, facts = train(args, rows)
    export.write_release(model.state_dict(), args.out)
    record = {
        "command": f"python demo/training/train.py --device {args.device} --steps {facts['steps']}"
        + (" --shakespeare shakespeare.txt" if args.shakespeare else ""),
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": SEED,
        "batch": [args.batch, LENGTH],
        "training": facts,
        "released_checkpoint": evaluate.measure(args.out, args.device, args.limit),
    }
    (args.out.parent / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["released_checkpoint"]))


if __name__ == "__main__":
    main()
