"""`lightship` as its command, in a process of its own.

Such a process is forked from a server that has imported torch and transformers, which takes seven seconds of a
processor; everything else, from the arguments to the exit code, is that of `python -m lightship`.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

FORK = multiprocessing.get_context("forkserver")
"""The one server of a test session, so that it imports what any of its users needs."""
FORK.set_forkserver_preload(["tests.conftest", "accelerate", "transformers.models.deepseek_v3.modeling_deepseek_v3"])
SECONDS = 120


def lightship(*arguments: str | Path, before: Callable[[], None] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; `before` is called first, in its process."""
    with tempfile.TemporaryDirectory() as folder:
        process = FORK.Process(target=_main, args=([*map(str, arguments)], Path(folder), before))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"lightship {arguments} has not ended within {SECONDS} s")
        said = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def refusal(*arguments: str | Path, before: Callable[[], None] | None = None) -> str:
    """The one line that a refused command prints."""
    done = lightship(*arguments, before=before)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("lightship: error: ")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def _main(arguments: list[str], folder: Path, before: Callable[[], None] | None) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    if before:
        before()
    sys.argv = ["lightship", *arguments]
    from lightship.cli import main

    main()
