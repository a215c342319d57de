"""serve, tune: a checkpoint behind an API, and the GPU kernels' plans.

lightship serve demo/checkpoint --tp 2
"""

import argparse
from pathlib import Path

from lightship.commands.arguments import Add, whole


def add_to(add: Add) -> None:
    """Add this family's subcommands."""
    sub = add(
        "serve",
        _serve,
        "Serve an FP8 or W4AFP8 checkpoint behind an OpenAI-compatible API, on the CPU.",
        "serve demo/checkpoint --tp 2",
    )
    sub.add_argument("checkpoint", type=Path, help="FP8 or W4AFP8 checkpoint directory")
    sub.add_argument("--tp", type=whole(1, 64), default=1, help="tensor-parallel processes (default: %(default)s)")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    sub.add_argument("--port", type=whole(0, 65535), default=8000, help="port to listen on (default: %(default)s)")
    sub.add_argument(
        "--activations",
        choices=["dynamic", "static"],
        default="dynamic",
        help="FP8 activation scales of W4AFP8 experts: found a token, or the checkpoint's (default: %(default)s)",
    )
    sub.add_argument("--name", help="model name in the API (default: the directory's name)")

    sub = add(
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


def _serve(arguments: argparse.Namespace) -> int:
    from lightship.serving.serve import serve

    serve(arguments.checkpoint, arguments.tp, arguments.host, arguments.port, arguments.activations, arguments.name)
    return 0


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
