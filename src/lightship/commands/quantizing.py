"""plan, quantize, verify, convert: from a checkpoint to another one.

lightship quantize demo/checkpoint OUT --recipe recipes/demo.toml
"""

import argparse
import sys
from pathlib import Path

from lightship.commands.arguments import USER_ERROR, Add, take_recipe


def add_to(add: Add) -> None:
    """Add this family's subcommands."""
    sub = add(
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

    sub = add(
        "quantize",
        _quantize,
        "Calibrate, and write the W4AFP8 checkpoint.",
        "quantize demo/checkpoint OUT --recipe recipes/demo.toml",
    )
    sub.add_argument("source", type=Path, help="FP8 checkpoint directory")
    sub.add_argument("out", type=Path, help="new directory for the W4AFP8 checkpoint")
    take_recipe(sub)
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    sub.add_argument(
        "--stash-memory",
        type=float,
        metavar="GB",
        help="memory that hidden states may take; beyond it they are files (default: half of what is free)",
    )

    sub = add(
        "verify",
        _verify,
        "Audit any W4AFP8 checkpoint: would SGLang serve it, and is it the model that it was made from?",
        "verify OUT --against demo/checkpoint",
    )
    sub.add_argument("checkpoint", type=Path, help="W4AFP8 checkpoint directory")
    sub.add_argument("--against", type=Path, help="the FP8 or BF16 checkpoint that it was made from, to compare with")
    sub.add_argument("--out", type=Path, help="write the record as JSON to this file")

    sub = add(
        "convert",
        _convert,
        "Write a W4AFP8 checkpoint again in another format, with the same weights.",
        "convert OUT OUT-CT --to compressed-tensors",
    )
    sub.add_argument("checkpoint", type=Path, help="W4AFP8 checkpoint directory")
    sub.add_argument("out", type=Path, help="new directory")
    sub.add_argument("--to", choices=["compressed-tensors"], required=True, help="the format to write")


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
