"""Serve a checkpoint directory with the local engine, until it is told to stop.

    lightship serve DIR --tp 2 --port 8000

The port and the degree of tensor parallelism are checked before anything is loaded; /health answers 503 until the model
is loaded. SIGTERM and Ctrl-C end all ranks; so does the death of any of them, with an error.
"""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightship.checkpoint import Checkpoint
from lightship.errors import ServingError

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI
    from transformers import PreTrainedTokenizerBase

    from lightship.experts import Activations
    from lightship.serving.engine import Engine

WHILE_STDIN_OPEN = "LIGHTSHIP_SERVE_WHILE_STDIN_OPEN"
"""If this environment variable is set, the server ends when its standard input does: when its launcher has died."""
SHUTDOWN_SECONDS = 5
"""Requests in progress get this long after SIGTERM."""


def serve(
    path: Path,
    tp: int = 1,
    host: str = "127.0.0.1",
    port: int = 8000,
    activations: "Activations" = "dynamic",
    served_name: str | None = None,
) -> None:
    """Serve `path` until SIGTERM or SIGINT.

    Args:
        path: an FP8 or a W4AFP8 directory.
        tp: tensor-parallel processes.
        port: 0 takes a free one, which the line that says "serving" names.
        served_name: what clients call the model; the directory's name if None.

    Raises:
        ServingError: `tp` is below 1, the port is in use, the experts cannot be divided by `tp`, or a rank has died.
        CheckpointError: the checkpoint cannot be loaded.
    """
    if tp < 1:
        raise ServingError(f"tensor parallelism {tp} is not possible: give --tp 1 or more")
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # read when torch is imported; threads that spin starve a busy machine
    begin = time.perf_counter()
    checkpoint = Checkpoint.open(path)
    name = served_name or path.resolve().name
    quantization = quantization_of(checkpoint)
    with listening(host, port) as listener:
        from lightship.causal_lm import load_tokenizer
        from lightship.experts import TensorParallel
        from lightship.serving.api import Served, create_app
        from lightship.serving.engine import Engine
        from lightship.serving.ranks import Ranks, Shard

        TensorParallel(0, tp).shard(checkpoint.dimensions.moe_intermediate_size)
        address = f"http://{host}:{listener.getsockname()[1]}"

        def announce() -> None:
            seconds = time.perf_counter() - begin
            print(f"lightship: serving {name} ({quantization}, tp {tp}) on {address} after {seconds:.1f} s", flush=True)

        with closing(Ranks(Shard(path, tp, activations))) as ranks:
            tokenizer = load_tokenizer(path)
            engine = Engine(ranks, tokenizer, eos_tokens(checkpoint, tokenizer), announce)
            engine.metrics.describe(model=name, tp=tp, activations=activations, quantization=quantization)
            sizes = checkpoint.config["max_position_embeddings"], checkpoint.config["vocab_size"]
            run_until_told(create_app(engine, Served(name, tokenizer, *sizes)), engine, listener)
    if engine.failure:
        raise engine.failure


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens on the address, so that nobody else takes it while the model is loaded.

    Raises:
        ServingError: the port is in use, or the address is not this machine's.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
        raise ServingError(
            f"port {port} on {host} {reason}; stop what listens there, or choose another with --port (0: any free one)"
        ) from error
    with listener:
        yield listener


def quantization_of(checkpoint: Checkpoint) -> str:
    """`w4afp8` or `fp8`, by what the experts are stored as."""
    layer_name = next(iter(checkpoint.expert_layers()), None)
    if layer_name is None:
        raise ServingError(f"{checkpoint.path} has no routed experts: engine local serves MoE models in FP8 or W4AFP8")
    return "w4afp8" if checkpoint.info(f"{layer_name}.experts.0.gate_proj.weight").dtype == "I8" else "fp8"


def eos_tokens(checkpoint: Checkpoint, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The tokens that end a sequence, by generation_config.json, config.json and the tokenizer together."""
    generation = checkpoint.path / "generation_config.json"
    stated = [checkpoint.config.get("eos_token_id"), tokenizer.eos_token_id]
    if generation.is_file():
        stated.append(json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id"))
    return {token for entry in stated for token in (entry if isinstance(entry, list) else [entry]) if token is not None}


def run_until_told(app: "FastAPI", engine: "Engine", listener: socket.socket) -> None:
    """Answer requests until a signal, the engine's failure, or the launcher's death."""
    import uvicorn

    class Server(uvicorn.Server):
        """Ends on the engine's failure too, and leaves a signal's exit code to us."""

        def handle_exit(self, sig: int, frame: "FrameType | None") -> None:  # noqa: ARG002
            self.should_exit = True

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or engine.failure is not None

    server = Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS)
    )

    def end_with_stdin() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock would abort the interpreter's exit
            pass
        server.should_exit = True

    if WHILE_STDIN_OPEN in os.environ:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    server.run([listener])
