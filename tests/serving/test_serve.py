"""How a server starts, refuses to start, and ends: real processes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightship.errors import ServingError
from lightship.recipe import Serving
from lightship.serving import serve as serving
from lightship.serving.launch import launched, start


def serve(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`lightship serve` that is expected to end by itself."""
    command = [sys.executable, "-m", "lightship", "serve", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def processes_of(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def gone_within(group: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while processes_of(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes_of(group)


def worker_of(server: int) -> int:
    """A tensor-parallel worker, by its command line."""
    return next(
        pid
        for pid in processes_of(server)
        if pid != server and b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def test_a_port_in_use_is_said_before_anything_is_loaded(w4afp8_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = serve(w4afp8_dir, "--port", str(port))
    assert ended.returncode == 2
    assert f"port {port} on 127.0.0.1 is in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_indivisible_degree_is_one_message(w4afp8_dir: Path) -> None:
    ended = serve(w4afp8_dir, "--tp", "3", "--port", "0")
    assert ended.returncode == 2
    assert "cannot be served at TP 3" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("tp", [0, -2])
def test_a_degree_below_one_is_refused_before_anything_is_read(tp: int, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=f"tensor parallelism {tp} "):
        serving.serve(tmp_path / "nothing", tp=tp)


def test_a_worker_that_dies_while_it_connects_ends_the_server(w4afp8_dir: Path) -> None:
    program = (
        "import sys; from lightship.serving import ranks; from tests.serving.test_ranks import DiesConnecting; "
        "ranks.Shard = DiesConnecting; from lightship.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "serve", str(w4afp8_dir), "--tp", "2", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 2
    assert re.search(r"rank 1 \(process \d+\) ended with exit code 9", ended.stderr)
    assert "Traceback" not in ended.stderr


def test_a_checkpoint_that_breaks_while_loading_is_one_message(w4afp8_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(w4afp8_dir, broken)
    (broken / "config.json").write_text(
        (broken / "config.json").read_text().replace('"vocab_size": 258', '"vocab_size": 300')
    )
    ended = serve(broken, "--port", "0")
    assert ended.returncode == 2
    assert "config.json asks for [300, 128]" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("number", "tp"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_leaves_no_process_behind(number: signal.Signals, tp: int, w4afp8_dir: Path, tmp_path: Path) -> None:
    with launched(w4afp8_dir, Serving(tp=tp), tmp_path / "serve.log") as server:
        assert len(processes_of(server.process.pid)) >= tp
        os.kill(server.process.pid, number)
        assert server.process.wait(10) == 0
        assert gone_within(server.process.pid, 5)


def test_a_dead_worker_ends_the_server_with_an_error(w4afp8_dir: Path, tmp_path: Path) -> None:
    with launched(w4afp8_dir, Serving(tp=2), tmp_path / "serve.log") as server:
        os.kill(worker_of(server.process.pid), signal.SIGKILL)
        assert server.process.wait(10) == 2
        assert gone_within(server.process.pid, 5)
    log = server.log_file.read_text()
    assert "tensor-parallel rank 1" in log
    assert "Traceback" not in log


def test_workers_leave_with_a_killed_rank_zero(w4afp8_dir: Path, tmp_path: Path) -> None:
    with launched(w4afp8_dir, Serving(tp=2), tmp_path / "serve.log") as server:
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(5)
        assert gone_within(server.process.pid, 5)


def test_a_server_ends_with_its_launcher(w4afp8_dir: Path, tmp_path: Path) -> None:
    server = start(w4afp8_dir, Serving(), tmp_path / "serve.log")
    server.wait_until_ready()
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(10) == 0
