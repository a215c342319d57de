"""What subcommands share: how one is added, and arguments of several.

sub = add("report", _report, "Write a finished release's report again.", "report 3f2a")
home(sub)
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

USER_ERROR = 2


class Add(Protocol):
    """Adds a subcommand."""

    def __call__(self, name: str, run: Callable[[Any], int], text: str, example: str, /) -> argparse.ArgumentParser: ...


def adding(top: argparse.ArgumentParser) -> Add:
    """What adds subcommands to `top`."""
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[Any], int], text: str, example: str, /) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: lightship {example}")
        sub.set_defaults(run=run)
        return sub

    return add


def take_recipe(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--recipe", type=Path, required=True, help="TOML file; recipes/ holds the shipped ones")


def take_home(sub: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("LIGHTSHIP_HOME", "lightship-home"))
    sub.add_argument(
        "--home",
        type=Path,
        default=default,
        help="where releases are kept (default: $LIGHTSHIP_HOME or %(default)s)",
    )


def take_target(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("target", help="a checkpoint directory, which is launched, or the URL of a server")
    sub.add_argument("--tokenizer", type=Path, help="tokenizer directory; needed for a URL")
    sub.add_argument("--out", type=Path, help="write the record as JSON to this file")


def whole(least: int, most: int) -> Callable[[str], int]:
    """An argument's type: a whole number in this range."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return number


def above_zero(text: str) -> float:
    """An argument's type: a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
