"""Switches that keep every test offline, and the checkpoints that many tests share."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_WAIT_POLICY="PASSIVE",
    TOKENIZERS_PARALLELISM="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="120",
)

import torch

if not torch.cuda.is_available():
    # Before transformers imports triton: its kernels are then interpreted, see test_rounding_triton.py.
    os.environ["TRITON_INTERPRET"] = "1"

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import settings

from lightship.checkpoint import Checkpoint
from lightship.quant.plan import plan_quantization
from lightship.quant.quantize import quantize
from lightship.recipe import CalibrationText, Quantization, TextSource
from lightship.records import Quantized
from tests.tiny import write_fp8_checkpoint

settings.register_profile("busy", deadline=None)
settings.load_profile("busy")  # how long an example takes depends on what else the machine does

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo" / "checkpoint"


def unseen(items: Iterable, _: str) -> Iterable:
    """A progress callback that shows nothing."""
    return items


def write_lines(path: Path, texts: Iterable[str]) -> Path:
    """A JSON-lines file of texts."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random FP8 checkpoint; never change it."""
    return write_fp8_checkpoint(tmp_path_factory.mktemp("fp8") / "tiny")


@pytest.fixture
def broken(fp8: Path, tmp_path: Path) -> Path:
    """A copy of `fp8` to break."""
    return shutil.copytree(fp8, tmp_path / "broken")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> CalibrationText:
    """Two scenes of text, a few thousand bytes each."""
    folder = tmp_path_factory.mktemp("text")
    prose = write_lines(folder / "prose.jsonl", [f"The ship number {i} leaves the harbour at dawn." for i in range(80)])
    code = write_lines(folder / "code.jsonl", [f"def f{i}(x):\n    return x * {i} + len(str(x))\n" for i in range(80)])
    return CalibrationText(
        sources=[TextSource(scene="prose", path=str(prose)), TextSource(scene="code", path=str(code))],
        tokens_per_scene=2048,
        sequence_tokens=256,
    )


@pytest.fixture(scope="session")
def quantize_to(fp8: Path, text: CalibrationText) -> Callable[..., Path]:
    """Quantize `fp8` (or `source`) into a directory by the given settings."""

    def run(out: Path, source: Path = fp8, text: CalibrationText = text, **settings: object) -> Path:
        quantize_checkpoint(source, out, text, Quantization(**settings))
        return out

    return run


def quantize_checkpoint(
    source: Path,
    out: Path,
    text: CalibrationText,
    settings: Quantization,
    *,
    progress: Callable[[Iterable, str], Iterable] = unseen,
    **options: object,
) -> Quantized:
    """Plan and quantize a checkpoint directory on the CPU."""
    checkpoint = Checkpoint.open(source)
    plan = plan_quantization(checkpoint)
    return quantize(checkpoint, plan, text, settings, out, progress, device="cpu", **options)


@pytest.fixture(scope="session")
def w4afp8(quantize_to: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fp8` as W4AFP8, by MSE-grid rounding; never change it."""
    return quantize_to(tmp_path_factory.mktemp("w4afp8") / "tiny", method="mse")
