"""The command line: one subcommand a stage, and `release` for all of them.

Nothing heavy is imported before a command needs it, so `lightship --help` answers at once.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightship import __version__

if TYPE_CHECKING:
    from lightship.contrast import Contrast
    from lightship.endpoint import Endpoint
    from lightship.recipe import Recipe
    from lightship.tracking import Tracker

DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Without it, OpenMP threads that spin on a busy core make small matrix work many times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # It removes what an interrupt leaves of Dask's workers, and need not say so.
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
}
WITHOUT_SERVER = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_ROOT_LEVEL": "ERROR",
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
}
"""With Prefect's ephemeral server nobody reads its log, and what matters of it is in our own output."""

USER_ERROR = 2


def main() -> NoReturn:
    """Run a command; exits with 0, with 1 if a check or the gate did not pass, or with 2 after a user's error."""
    from lightship.errors import LightshipError

    arguments = parser().parse_args()
    interrupted: list[int] = []

    def interrupt(number: int, _: object) -> None:
        interrupted.append(number)
        if arguments.command in ("quantize", "release"):
            # What is on the disk makes them safe to stop anywhere, and Prefect would wait minutes for a lost server.
            _leave(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    for name, value in (DEFAULTS if "PREFECT_API_URL" in os.environ else DEFAULTS | WITHOUT_SERVER).items():
        os.environ.setdefault(name, value)
    try:
        code = arguments.run(arguments)
    except LightshipError as error:
        print(f"lightship: error: {error}", file=sys.stderr)
        code = USER_ERROR
    except BaseException as error:
        # What an interrupt unwinds may fail in its own way.
        if not interrupted or isinstance(error, SystemExit):
            raise
        _leave(interrupted[0])
    sys.exit(code)


def _leave(number: int) -> NoReturn:
    """Say that a signal has interrupted the command, and end this process and its children at once."""
    print("lightship: interrupted; the same command goes on from the last finished stage", file=sys.stderr, flush=True)
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGTERM)
    os._exit(128 + number)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="lightship",
        description="Quantize a Mixture-of-Experts model to W4AFP8, prove that it is the same model, and ship it.",
        epilog="example: lightship release demo/checkpoint --recipe recipes/demo.toml",
    )
    top.add_argument("--version", action="version", version=f"lightship {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], int], text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: lightship {example}")
        sub.set_defaults(run=run)
        return sub

    def recipe(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--recipe", type=Path, required=True, help="TOML file; recipes/ holds the shipped ones")

    def home(sub: argparse.ArgumentParser) -> None:
        default = Path(os.environ.get("LIGHTSHIP_HOME", "lightship-home"))
        sub.add_argument(
            "--home",
            type=Path,
            default=default,
            help="where releases are kept (default: $LIGHTSHIP_HOME or %(default)s)",
        )

    def target(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("target", help="a checkpoint directory, which is launched, or the URL of a server")
        sub.add_argument("--tokenizer", type=Path, help="tokenizer directory; needed for a URL")
        sub.add_argument("--out", type=Path, help="write the record as JSON to this file")

    sub = command(
        "plan",
        _plan,
        "Look before the work: what becomes of every tensor, what it takes, how long, and where the result fits.",
        "plan demo/checkpoint --recipe recipes/demo.toml --out-dir OUT",
    )
    sub.add_argument("source", type=Path, help="checkpoint directory, FP8 blocks or BF16")
    sub.add_argument("--recipe", type=Path, help="rounding and calibration (default: GPTQ on 131,072 tokens)")
    sub.add_argument("--out-dir", type=Path, help="where the result will be written: is there room, what is done")
    sub.add_argument("--gpu-hour", type=float, default=2.50, help="price of an hour (default: %(default)s)")
    sub.add_argument("--no-probe", action="store_true", help="measure nothing, and estimate no time")
    sub.add_argument("--tensors", action="store_true", help="list every tensor")
    sub.add_argument("--out", type=Path, help="write the record as JSON to this file")

    sub = command(
        "quantize",
        _quantize,
        "Calibrate, and write the W4AFP8 checkpoint.",
        "quantize demo/checkpoint OUT --recipe recipes/demo.toml",
    )
    sub.add_argument("source", type=Path, help="FP8 checkpoint directory")
    sub.add_argument("out", type=Path, help="new directory for the W4AFP8 checkpoint")
    recipe(sub)
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    sub.add_argument(
        "--stash-memory",
        type=float,
        metavar="GB",
        help="memory that hidden states may take; beyond it they are files (default: half of what is free)",
    )

    sub = command(
        "verify",
        _verify,
        "Audit any W4AFP8 checkpoint: would SGLang serve it, and is it the model that it was made from?",
        "verify OUT --against demo/checkpoint",
    )
    sub.add_argument("checkpoint", type=Path, help="W4AFP8 checkpoint directory")
    sub.add_argument("--against", type=Path, help="the FP8 or BF16 checkpoint that it was made from, to compare with")
    sub.add_argument("--out", type=Path, help="write the record as JSON to this file")

    sub = command(
        "convert",
        _convert,
        "Write a W4AFP8 checkpoint again in another format, with the same weights.",
        "convert OUT OUT-CT --to compressed-tensors",
    )
    sub.add_argument("checkpoint", type=Path, help="W4AFP8 checkpoint directory")
    sub.add_argument("out", type=Path, help="new directory")
    sub.add_argument("--to", choices=["compressed-tensors"], required=True, help="the format to write")

    sub = command(
        "serve",
        _serve,
        "Serve an FP8 or W4AFP8 checkpoint behind an OpenAI-compatible API, on the CPU.",
        "serve demo/checkpoint --tp 2",
    )
    sub.add_argument("checkpoint", type=Path, help="FP8 or W4AFP8 checkpoint directory")
    sub.add_argument("--tp", type=_from(1, 64), default=1, help="tensor-parallel processes (default: %(default)s)")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    sub.add_argument("--port", type=_from(0, 65535), default=8000, help="port to listen on (default: %(default)s)")
    sub.add_argument(
        "--activations",
        choices=["dynamic", "static"],
        default="dynamic",
        help="FP8 activation scales of W4AFP8 experts: found a token, or the checkpoint's (default: %(default)s)",
    )
    sub.add_argument("--name", help="model name in the API (default: the directory's name)")

    sub = command(
        "evaluate",
        _evaluate,
        "Ask the recipe's questions through lm-eval; the same command goes on where it was interrupted.",
        "evaluate http://127.0.0.1:8000 --tokenizer demo/checkpoint --recipe recipes/demo.toml",
    )
    target(sub)
    recipe(sub)
    home(sub)
    sub.add_argument("--limit", type=_from(1, 10**9), help="ask this many questions (default: the recipe's limit)")
    sub.add_argument("--model", help="of a URL, the model's name there (default: the first that it lists)")
    sub.add_argument(
        "--api-key-file", type=Path, help="of a URL, a file with its API key (default: LIGHTSHIP_API_KEY, if set)"
    )
    sub.add_argument("--fresh", action="store_true", help="forget the answers that this command has got before")

    sub = command(
        "bench",
        _bench,
        "Time a server under the recipe's load, in turns with another.",
        "bench OUT --against demo/checkpoint --recipe recipes/demo.toml",
    )
    target(sub)
    sub.add_argument("--against", required=True, help="the source: a checkpoint directory, or the URL of a server")
    recipe(sub)

    sub = command(
        "release",
        _release,
        "Plan, quantize, verify, stage, evaluate, benchmark, judge and promote.",
        "release demo/checkpoint --recipe recipes/demo.toml",
    )
    sub.add_argument("source", type=Path, help="FP8 checkpoint directory")
    recipe(sub)
    home(sub)
    sub.add_argument("--no-promote", action="store_true", help="leave a passing release as challenger")

    sub = command(
        "tune",
        _tune,
        "Time the W4AFP8 MoE kernels' plans on this GPU, and write the fastest as a table.",
        "tune --shape tp8 --shape ep8 --out NVIDIA_H100_80GB_HBM3.json",
    )
    sub.add_argument(
        "--shape",
        action="append",
        required=True,
        help="tp8 or ep8 of DeepSeek-V3, or a rank's H,I,E,K[,TOTAL]; may be given several times",
    )
    sub.add_argument("--tokens", help="numbers of tokens, as 1,16,256 (default: ten from 1 to 8192)")
    sub.add_argument("--out", type=Path, required=True, help="the table, a JSON file")

    sub = command(
        "decide",
        _decide,
        "Judge a finished release again, by its recipe's gate or another's; nothing is run and nothing is written.",
        "decide 3f2a --policy recipes/deepseek-v3.toml",
    )
    sub.add_argument("release", help="release id, or its first characters")
    sub.add_argument("--policy", type=Path, help="TOML file with a table [gate] (default: the release's recipe)")
    sub.add_argument("--out", type=Path, help="write the verdict as JSON to this file")
    home(sub)

    sub = command("promote", _promote, "Make a release that passed the gate the champion.", "promote 3f2a")
    sub.add_argument("release", help="release id, or its first characters")
    sub.add_argument("--override", action="store_true", help="promote in spite of the verdict; needs --by and --reason")
    sub.add_argument("--by", metavar="NAME", help="who overrides")
    sub.add_argument("--reason", metavar="TEXT", help="why")
    home(sub)

    sub = command("report", _report, "Write a finished release's report again.", "report 3f2a")
    sub.add_argument("release", help="release id, or its first characters")
    home(sub)

    sub = command(
        "compare",
        _compare,
        "Hold two releases against each other, from MLflow; of any other number, show each in a row.",
        "compare 3f2a champion",
    )
    sub.add_argument(
        "releases", nargs="*", help="release ids, their first characters, or `champion` (default: all releases)"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    home(sub)
    return top


def _from(least: int, most: int) -> Callable[[str], int]:
    """An argument's type: a whole number in this range."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return number


def _plan(arguments: argparse.Namespace) -> int:
    from lightship import tables
    from lightship.checkpoint import Checkpoint
    from lightship.files import write_json
    from lightship.quant.preflight import PROBE_SECONDS, preflight
    from lightship.recipe import Quantization, load_recipe

    recipe = load_recipe(arguments.recipe) if arguments.recipe else None
    found = preflight(
        Checkpoint.open(arguments.source),
        recipe.quantization if recipe else Quantization(),
        recipe.calibration if recipe else None,
        arguments.out_dir,
        gpu_hour=arguments.gpu_hour,
        probe_seconds=0 if arguments.no_probe else PROBE_SECONDS,
        tensors=arguments.tensors,
    )
    if arguments.tensors:
        tables.show(tables.tensor_table(found.planned))
    for table in (tables.parts_table, tables.degrees_table, tables.fits_table, tables.needs_table):
        tables.show(table(found))
        print()
    print(tables.time_sentence(found))
    for note in found.notes:
        print(f"note: {note}")
    if arguments.out:
        write_json(arguments.out, found)
    for problem in found.problems:
        print(f"lightship: error: {problem}", file=sys.stderr)
    return USER_ERROR if found.problems else 0


def _quantize(arguments: argparse.Namespace) -> int:
    from lightship import summary
    from lightship.checkpoint import Checkpoint
    from lightship.files import read_json
    from lightship.flows import needing_cluster_packages
    from lightship.progress import tracked
    from lightship.quant.plan import plan_quantization
    from lightship.quant.quantize import CALIBRATION, quantize
    from lightship.recipe import load_recipe
    from lightship.records import Calibration
    from lightship.tables import calibration_table, show

    recipe, out = load_recipe(arguments.recipe), arguments.out.absolute()
    published = out.exists()
    checkpoint = Checkpoint.open(arguments.source)
    plan = plan_quantization(checkpoint)
    print(f"plan         {summary.sentence(plan)}", flush=True)
    memory = arguments.stash_memory and int(arguments.stash_memory * 1e9)
    if recipe.cluster:
        with needing_cluster_packages():
            from lightship.flows.cluster import quantize as quantize_on_cluster
        quantized = quantize_on_cluster(checkpoint, plan, recipe, out, arguments.device, memory)
    else:
        quantized = quantize(
            checkpoint,
            plan,
            recipe.calibration,
            recipe.quantization,
            out,
            tracked,
            device=arguments.device,
            stash_memory=memory,
        )
    if published:
        print("finished     by an earlier run of this command, which was stopped when all but its tidying up was done")
    calibration = read_json(out / CALIBRATION, Calibration)
    print(f"calibration  {summary.sentence(calibration)}")
    print(f"quantized    {summary.sentence(quantized)}, in {quantized.path}\n")
    show(calibration_table(calibration))
    print(f"\nnext: lightship verify {arguments.out} --against {arguments.source}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from lightship import summary
    from lightship.errors import LightshipError
    from lightship.files import write_json
    from lightship.quant.verify import verify
    from lightship.tables import error_table, show, verification_table

    if not arguments.checkpoint.is_dir():
        raise LightshipError(f"{arguments.checkpoint} is not a directory; give that of a W4AFP8 checkpoint")
    verification = verify(arguments.checkpoint, arguments.against)
    show(verification_table(verification))
    if verification.layers:
        print()
        show(error_table(verification))
    failed = [check.name for check in verification.checks if not check.passed]
    print(f"\nnot servable as it is: {', '.join(failed)}" if failed else f"\n{summary.sentence(verification)}")
    if arguments.out:
        write_json(arguments.out, verification)
    return 0 if verification.passed else 1


def _convert(arguments: argparse.Namespace) -> int:
    from lightship.progress import tracked
    from lightship.quant.compressed_tensors import convert
    from lightship.summary import size

    written = convert(arguments.checkpoint, arguments.out.absolute(), tracked)
    print(f"converted    {size(written)} as {arguments.to}, in {arguments.out}")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from lightship.serving.serve import serve

    serve(arguments.checkpoint, arguments.tp, arguments.host, arguments.port, arguments.activations, arguments.name)
    return 0


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
    if arguments.fresh:
        (work / ANSWERS).unlink(missing_ok=True)
    key = read_api_key(arguments.api_key_file)
    tokenizer = arguments.tokenizer or (Path() if task.api == "chat" else None)
    with (
        tempfile.TemporaryDirectory() as logs,
        _served(recipe, Path(logs), tokenizer, arguments.target, key=key, model=arguments.model) as (endpoint,),
    ):
        accuracy = evaluate(endpoint, task, work)
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


def _release(arguments: argparse.Namespace) -> int:
    from lightship.flows.inputs import check_inputs

    check_inputs(arguments.source, arguments.recipe)
    from lightship.eval.evidence import read_receipt
    from lightship.eval.receipt import MARKDOWN, terminal
    from lightship.files import read_json
    from lightship.flows.release import release
    from lightship.records import Verdict
    from lightship.tables import print_release

    release_id = release(
        str(arguments.source), str(arguments.recipe), str(arguments.home), promote=not arguments.no_promote
    )
    directory = arguments.home / "releases" / release_id
    print_release(directory)
    verdict = read_json(directory / "verdict.json", Verdict)
    if receipt := read_receipt(directory, verdict):
        print(f"\nwhy not, in full in {directory / MARKDOWN}\n{terminal(receipt)}")
    return 0 if verdict.decision == "pass" else 1


def _tune(arguments: argparse.Namespace) -> int:
    from lightship.serving.moe.tuning import TOKENS, parse_shape, parse_tokens

    shapes = [parse_shape(text) for text in arguments.shape]
    tokens = parse_tokens(arguments.tokens) if arguments.tokens else TOKENS
    from lightship.serving.moe.tune import tune

    table = tune(shapes, arguments.out, tokens)
    for entry in table.entries:
        for best in entry.measured:
            print(f"{best.tokens:6d} tokens  {best.us:9.1f} us  {best.plan}")
    return 0


def _decide(arguments: argparse.Namespace) -> int:
    from lightship.eval.evidence import read_champion, read_measured, read_receipt
    from lightship.eval.gate import decide
    from lightship.eval.receipt import terminal
    from lightship.files import write_json
    from lightship.policy import load_policy
    from lightship.release import find_release
    from lightship.tables import rules_table, show
    from lightship.tracking import Tracker

    found = find_release(arguments.home, arguments.release)
    gate = load_policy(arguments.policy) if arguments.policy else found.recipe.gate
    directory = arguments.home / "releases" / found.release_id
    champion = None
    if gate.by_champion:
        name = Tracker.connect(arguments.home).champion_release(found.recipe.model)
        champion = read_champion(arguments.home, name, found.release_id)
    verdict = decide(gate, read_measured(directory), champion)
    show(rules_table(verdict))
    receipt = read_receipt(directory, verdict)
    print(f"\nverdict: {terminal(receipt) if receipt else 'pass'}")
    if arguments.out:
        write_json(arguments.out, verdict)
    return 0 if verdict.decision == "pass" else 1


def _promote(arguments: argparse.Namespace) -> int:
    from lightship import summary
    from lightship.errors import PromotionError
    from lightship.files import write_json
    from lightship.promotion import Signature, promote
    from lightship.release import find_release
    from lightship.tracking import Tracker

    found = find_release(arguments.home, arguments.release)
    directory = arguments.home / "releases" / found.release_id
    if not arguments.override and (arguments.by or arguments.reason):
        raise PromotionError("--by and --reason belong to --override; add it, or leave them out")
    signature = Signature(arguments.by or "", arguments.reason or "") if arguments.override else None
    promoted = promote(directory, found.recipe.model, Tracker.connect(arguments.home), signature)
    write_json(directory / "promoted.json", promoted)
    print(summary.sentence(promoted))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from lightship.eval.evidence import read_evidence
    from lightship.eval.report import write_report
    from lightship.release import find_release

    directory = arguments.home / "releases" / find_release(arguments.home, arguments.release).release_id
    write_report(directory / "report.html", read_evidence(directory))
    print(directory / "report.html")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    import msgspec

    from lightship.contrast_tables import contrast_view, releases_table
    from lightship.release import find_releases
    from lightship.tables import show
    from lightship.tracking import Tracker

    tracker = Tracker.connect(arguments.home)
    if len(arguments.releases) == 2:
        held = _contrast(tracker, arguments.home, *find_releases(arguments.home, arguments.releases, tracker))
        view: Any = contrast_view(held)
    else:
        named = find_releases(arguments.home, arguments.releases, tracker) if arguments.releases else None
        held = tracker.sides(named)
        view = releases_table(held)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(held)).decode())
    else:
        show(view)
    return 0


def _contrast(tracker: "Tracker", home: Path, first: str, second: str) -> "Contrast":
    """Two releases, and what the second lost of the first's answers, in pairs."""
    from lightship.contrast import contrast
    from lightship.errors import LightshipError
    from lightship.eval.evidence import read_measured
    from lightship.eval.losses import compare_with_champion

    sides = tracker.sides([first, second])
    try:
        answers = compare_with_champion(*(read_measured(home / "releases" / name) for name in (first, second)))
    except LightshipError as error:
        return contrast(*sides, not_paired=str(error))
    return contrast(*sides, answers)
