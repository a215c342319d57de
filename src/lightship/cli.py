"""The command line: one subcommand a stage, and `release` for all of them.

Nothing heavy is imported before a command needs it, so `lightship --help` answers at once.
"""

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from lightship import __version__
from lightship.commands import measuring, quantizing, releasing, serving
from lightship.commands.arguments import USER_ERROR, adding

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
    add = adding(top)
    for family in (quantizing, serving, measuring, releasing):
        family.add_to(add)
    return top
