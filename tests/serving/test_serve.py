"""How a server starts, refuses to start, and ends: real processes."""

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from lightship.errors import ServingError
from lightship.recipe import Serving
from lightship.serving import ranks
from lightship.serving import serve as serving
from lightship.serving.launch import Launched, launched, start
from tests.commands import refusal
from tests.serving.test_ranks import DiesConnecting


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
        port = str(taken.getsockname()[1])
        assert f"port {port} on 127.0.0.1 is in use" in refusal("serve", w4afp8_dir, "--port", port)


def test_an_indivisible_degree_is_one_message(w4afp8_dir: Path) -> None:
    assert "cannot be served at TP 3" in refusal("serve", w4afp8_dir, "--tp", "3", "--port", "0")


@pytest.mark.parametrize("tp", [0, -2])
def test_a_degree_below_one_is_refused_before_anything_is_read(tp: int, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=f"tensor parallelism {tp} "):
        serving.serve(tmp_path / "nothing", tp=tp)


def test_a_worker_that_dies_while_it_connects_ends_the_server(w4afp8_dir: Path) -> None:
    said = refusal("serve", w4afp8_dir, "--tp", "2", "--port", "0", before=take_workers_that_die)
    assert re.search(r"rank 1 \(process \d+\) ended with exit code 9", said)


def take_workers_that_die() -> None:
    ranks.Shard = DiesConnecting


def test_a_checkpoint_that_breaks_while_loading_is_one_message(w4afp8_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(w4afp8_dir, broken)
    (broken / "config.json").write_text(
        (broken / "config.json").read_text().replace('"vocab_size": 258', '"vocab_size": 300')
    )
    assert "config.json asks for [300, 128]" in refusal("serve", broken, "--port", "0")


@dataclass(frozen=True)
class Started:
    """Two servers that were started at once, and what /health answered at each while both were ready."""

    servers: list[Launched]
    answers: list[int]


@pytest.fixture(scope="module")
def pair(fp8_dir: Path, w4afp8_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """Each is ended by one test at most."""
    logs = tmp_path_factory.mktemp("pair")
    servers = [start(path, Serving(), logs / f"{path.name}.log") for path in (fp8_dir, w4afp8_dir)]
    try:
        for server in servers:
            server.wait_until_ready()
        urls = [f"{server.endpoint.base_url}/health" for server in servers]
        yield Started(servers, [httpx.get(url, trust_env=False).status_code for url in urls])
    finally:
        for server in servers:
            server.stop()


def test_two_servers_start_at_once(pair: Started) -> None:
    assert pair.answers == [200, 200]


def test_an_interrupt_ends_the_server(pair: Started) -> None:
    ends_without_a_trace(pair.servers[0], signal.SIGINT)


def test_a_server_ends_with_its_launcher(pair: Started) -> None:
    server = pair.servers[1]
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(10) == 0


def test_a_signal_leaves_no_process_behind(w4afp8_dir: Path, tmp_path: Path) -> None:
    with launched(w4afp8_dir, Serving(tp=2), tmp_path / "serve.log") as server:
        assert len(processes_of(server.process.pid)) >= 2
        ends_without_a_trace(server, signal.SIGTERM)


def ends_without_a_trace(server: Launched, number: signal.Signals) -> None:
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
