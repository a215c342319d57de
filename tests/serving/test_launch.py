import shutil
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightship.checkpoint import MANIFEST
from lightship.errors import CheckpointError, ServingError
from lightship.files import digest_of_file
from lightship.recipe import Serving
from lightship.serving.launch import Launched, stage, start


def test_staging_records_a_real_greeting(server: Launched, w4afp8_dir: Path) -> None:
    staged = stage(w4afp8_dir, server)
    assert (staged.engine, staged.tensor_parallel) == ("local", 2)
    assert staged.manifest_digest == digest_of_file(w4afp8_dir / MANIFEST)
    assert staged.greeting
    assert 0 < staged.ready_seconds < 120
    assert staged.command[1:5] == ["-P", "-m", "lightship", "serve"]
    assert "lightship: serving tiny (w4afp8, tp 2) on " + staged.base_url in server.log_file.read_text()


def test_staging_refuses_files_that_are_not_the_manifests(server: Launched, w4afp8_dir: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(w4afp8_dir, tmp_path / "changed")
    (changed / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json has changed"):
        stage(changed, server)


def test_a_server_of_other_files_or_other_settings_has_another_identity(server: Launched, tmp_path: Path) -> None:
    def identity(**changes: Any) -> str:
        other = replace(server, **changes)
        return other.endpoint.identity

    copy = shutil.copytree(server.path, tmp_path / "copy", copy_function=shutil.copy2)
    assert identity() == server.endpoint.identity == identity(base_url="http://127.0.0.1:9")
    assert identity(settings=Serving(tp=2, activations="static")) != identity()
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace("{", '{"rope_theta_of_another": 1,', 1))
    assert identity(path=copy) != identity()


def test_whoever_else_answers_on_the_port_is_not_our_server(w4afp8_dir: Path, tmp_path: Path) -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        server = start(w4afp8_dir, Serving(), tmp_path / "serve.log", stranger.server_port)
        try:
            with pytest.raises(ServingError, match=f"port {stranger.server_port} on 127.0.0.1 is in use"):
                server.wait_until_ready()
        finally:
            server.stop()
            stranger.shutdown()


def test_a_server_that_cannot_start_quotes_its_log(tmp_path: Path) -> None:
    log_file = tmp_path / "serve.log"
    server = start(tmp_path, Serving(), log_file)
    with pytest.raises(ServingError, match=r"ended with exit code [1-9]") as caught:
        server.wait_until_ready()
    server.stop()
    assert "has no config.json" in str(caught.value)
    assert str(log_file) in str(caught.value)


def test_a_server_that_is_too_slow_is_stopped(w4afp8_dir: Path, tmp_path: Path) -> None:
    server = start(w4afp8_dir, Serving(ready_seconds=1), tmp_path / "serve.log")
    server.started = time.perf_counter() - 60
    with pytest.raises(ServingError, match="raise ready_seconds"):
        server.wait_until_ready()
    server.stop()
    assert server.process.returncode is not None
