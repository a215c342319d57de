"""evaluate, bench, load: what a served model knows, and how fast it answers.

lightship evaluate http://127.0.0.1:8000 --tokenizer demo/checkpoint --recipe recipes/demo.toml
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lightship.commands.arguments import Add, above_zero, take_home, take_recipe, take_target, whole

if TYPE_CHECKING:
    from lightship.endpoint import Endpoint
    from lightship.recipe import Recipe


def add_to(add: Add) -> None:
    """Add this family's subcommands."""
    sub = add(
        "evaluate",
        _evaluate,
        "Ask the recipe's questions through lm-eval; the same command goes on where it was interrupted.",
        "evaluate http://127.0.0.1:8000 --tokenizer demo/checkpoint --recipe recipes/demo.toml",
    )
    take_target(sub)
    take_recipe(sub)
    take_home(sub)
    sub.add_argument("--limit", type=whole(1, 10**9), help="ask this many questions (default: the recipe's limit)")
    sub.add_argument("--model", help="of a URL, the model's name there (default: the first that it lists)")
    sub.add_argument(
        "--api-key-file", type=Path, help="of a URL, a file with its API key (default: LIGHTSHIP_API_KEY, if set)"
    )
    sub.add_argument("--fresh", action="store_true", help="forget the answers that this command has got before")

    sub = add(
        "bench",
        _bench,
        "Time a server under the recipe's load, in turns with another.",
        "bench OUT --against demo/checkpoint --recipe recipes/demo.toml",
    )
    take_target(sub)
    sub.add_argument("--against", required=True, help="the source: a checkpoint directory, or the URL of a server")
    take_recipe(sub)

    sub = add(
        "load",
        _load,
        "Put a server, or two in turns, under load: so many requests at once, at a rate, or as a trace tells.",
        "load http://127.0.0.1:8000 --tokenizer DIR --trace conv.csv --seconds 60",
    )
    sub.add_argument("url", help="of an OpenAI-compatible server")
    sub.add_argument("--tokenizer", type=Path, required=True, help="directory with the model's tokenizer")
    sub.add_argument("--against", metavar="URL", help="another server, measured first, for the ratio")
    how = sub.add_mutually_exclusive_group(required=True)
    how.add_argument("--concurrency", type=whole(1, 100_000), help="requests in flight")
    how.add_argument("--rate", type=above_zero, help="requests a second, Poisson arrivals")
    how.add_argument(
        "--trace", type=Path, metavar="FILE", help="Azure's LLM inference trace (.csv) or Mooncake's (.jsonl)"
    )
    how.add_argument("--sweep", choices=["rate", "concurrency"], const="rate", nargs="?", help="find the knee")
    sub.add_argument("--seconds", type=above_zero, help="of arrivals; of a sweep's step (default: 60; 20)")
    sub.add_argument("--requests", type=whole(1, 10_000_000), help="at most so many of a trace; so many otherwise")
    sub.add_argument("--speed", type=above_zero, default=1.0, help="2.0 replays a trace twice as fast")
    sub.add_argument("--fit", choices=["clip", "scale"], default="clip", help="what becomes of a trace's long requests")
    sub.add_argument("--factor", type=above_zero, help="with --fit scale: multiply lengths by this (default: to fit)")
    sub.add_argument("--window", type=whole(2, 100_000_000), help="tokens of prompt and answer (default: the server's)")
    sub.add_argument("--prompt-tokens", type=whole(1, 10_000_000), default=256, help="(default: %(default)s)")
    sub.add_argument("--output-tokens", type=whole(1, 1_000_000), default=32, help="(default: %(default)s)")
    sub.add_argument("--text", type=Path, help="file or folder that prompts are made of (default: random tokens)")
    sub.add_argument("--ttft-ms", type=above_zero, help="limit of the time to the first token")
    sub.add_argument("--tpot-ms", type=above_zero, help="limit of the time a further token")
    sub.add_argument(
        "--share", type=above_zero, default=0.9, help="of requests within the limits (default: %(default)s)"
    )
    sub.add_argument("--start", type=above_zero, default=1.0, help="a sweep's first load (default: %(default)s)")
    sub.add_argument("--most", type=above_zero, help="a sweep's largest load")
    sub.add_argument("--seed", type=whole(0, 2**31), default=0, help="of Poisson arrivals (default: %(default)s)")
    sub.add_argument("--warmup-requests", type=whole(0, 1_000_000), default=0, help="sent first, and not counted")
    sub.add_argument(
        "--warmup-seconds", type=float, default=0.0, help="what begins in the first seconds is not counted"
    )
    sub.add_argument("--api-key-file", type=Path, help="file with the servers' API key (default: $LIGHTSHIP_API_KEY)")
    sub.add_argument("--sglang", metavar="PYTHON", help="let SGLang's own client make the load, run by this command")
    sub.add_argument("--out", type=Path, help="write the record as JSON to this file")


def _evaluate(arguments: argparse.Namespace) -> int:
    import msgspec

    from lightship import summary
    from lightship.endpoint import read_api_key
    from lightship.eval.accuracy import ANSWERS, evaluate
    from lightship.files import write_json
    from lightship.recipe import load_recipe
    from lightship.release import evaluation_directory
    from lightship.tables import accuracy_table, show, tasks_table

    recipe = load_recipe(arguments.recipe)
    task = recipe.accuracy
    if arguments.limit:
        task = msgspec.structs.replace(task, limit=arguments.limit)
    work = evaluation_directory(arguments.home, arguments.target, recipe)
    key = read_api_key(arguments.api_key_file)
    tokenizer = arguments.tokenizer or (Path() if task.api == "chat" else None)
    with (
        tempfile.TemporaryDirectory() as logs,
        _served(recipe, Path(logs), tokenizer, arguments.target, key=key, model=arguments.model) as (endpoint,),
    ):
        accuracy = evaluate(endpoint, task, work, fresh=arguments.fresh)
    show(accuracy_table(accuracy))
    if accuracy.tasks:
        print()
        show(tasks_table(accuracy))
    print(f"{summary.sentence(accuracy)}; every answer is in {work / ANSWERS}")
    if arguments.out:
        write_json(arguments.out, accuracy)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from lightship import summary
    from lightship.eval.throughput import benchmark
    from lightship.files import write_json
    from lightship.recipe import load_recipe
    from lightship.tables import show, throughput_table
    from lightship.text import read_prompts

    recipe = load_recipe(arguments.recipe)
    with (
        tempfile.TemporaryDirectory() as work,
        _served(recipe, Path(work), arguments.tokenizer, arguments.against, arguments.target) as (source, quantized),
    ):
        prompts = read_prompts(recipe.fidelity.sources[0], source.tokenizer, recipe.throughput)
        throughput = benchmark({"source": source, "quantized": quantized}, recipe.throughput, prompts)
    show(throughput_table(throughput))
    print(summary.sentence(throughput))
    if arguments.out:
        write_json(arguments.out, throughput)
    return 0


def _load(arguments: argparse.Namespace) -> int:
    from lightship import summary
    from lightship.endpoint import Endpoint, read_api_key
    from lightship.eval.load.command import run_load
    from lightship.files import write_json
    from lightship.records import SweepReport
    from lightship.tables import load_table, show, sweep_table

    key = read_api_key(arguments.api_key_file)
    urls = [arguments.against, arguments.url] if arguments.against else [arguments.url]
    report = run_load({url: Endpoint.connect(url, arguments.tokenizer, key) for url in urls}, arguments)
    show(sweep_table(report) if isinstance(report, SweepReport) else load_table(report))
    print(summary.sentence(report))
    if arguments.out:
        write_json(arguments.out, report)
    return 0


@contextlib.contextmanager
def _served(
    recipe: "Recipe",
    work: Path,
    tokenizer: Path | None,
    *targets: str,
    key: str | None = None,
    model: str | None = None,
) -> "Iterator[list[Endpoint]]":
    """The endpoint of each target; directories are launched by the recipe, URLs are taken as they are."""
    from lightship.checkpoint import Checkpoint
    from lightship.endpoint import Endpoint
    from lightship.errors import LightshipError
    from lightship.serving.launch import launched

    with contextlib.ExitStack() as stack:
        endpoints = []
        for number, target in enumerate(targets):
            if not target.startswith(("http://", "https://")):
                Checkpoint.open(Path(target))
                server = launched(Path(target), recipe.serving, work / f"serve-{number}.log")
                endpoints.append(stack.enter_context(server).endpoint)
            elif tokenizer is None or not tokenizer.is_dir():
                raise LightshipError(f"{target} is a URL: give --tokenizer DIR, a directory with the model's tokenizer")
            else:
                endpoints.append(Endpoint.connect(target, tokenizer, key, model))
        yield endpoints
