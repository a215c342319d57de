"""Checkpoints in both formats and one running server, shared by the tests of serving."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightship.checkpoint import EXPERT
from lightship.manifest import Manifest, describe_files, write_manifest
from lightship.recipe import Serving
from lightship.serving.launch import Launched, launched
from lightship.w4afp8 import GROUP, dequantize_fp8_blocks, pack_int4
from tests.tiny import write_fp8_checkpoint

os.environ["HF_HUB_OFFLINE"] = "1"
MODEL = "tiny"


@pytest.fixture(scope="session")
def fp8_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint that TP 8 divides into whole groups of 128."""
    return write_fp8_checkpoint(tmp_path_factory.mktemp("fp8"), moe_intermediate_size=1024)


@pytest.fixture(scope="session")
def w4afp8_dir(fp8_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its experts rounded to int4."""
    return round_to_int4(fp8_dir, tmp_path_factory.mktemp("w4afp8"))


def round_to_int4(fp8_dir: Path, path: Path) -> Path:
    """Write an FP8 checkpoint as W4AFP8 to the empty directory `path`; returns it."""
    shutil.copytree(fp8_dir, path, dirs_exist_ok=True)
    for shard in path.glob("*.safetensors"):
        shard.unlink()
    tensors = {name: t for shard in fp8_dir.glob("*.safetensors") for name, t in load_file(shard).items()}
    for name in [n for n in tensors if EXPERT.match(n) and n.endswith(".weight")]:
        w_OGg = dequantize_fp8_blocks(tensors[name], tensors[f"{name}_scale_inv"]).unflatten(-1, (-1, GROUP))
        scale_OG1 = (w_OGg.abs().amax(-1, keepdim=True) / 7).bfloat16()
        q_OI = (w_OGg / scale_OG1.float()).round().clamp(-8, 7).to(torch.int8).flatten(-2)
        tensors[name], tensors[f"{name}_scale_inv"] = pack_int4(q_OI), scale_OG1.squeeze(-1)
        expert = name.rsplit(".", 2)[0]
        for weight in ("w1", "w2", "w3"):
            tensors[f"{expert}.{weight}.input_scale"] = torch.tensor(0.01, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "model.safetensors.index.json").unlink()
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "w4afp8"}
    (path / "config.json").write_text(json.dumps(config))
    manifest = Manifest(
        format="w4afp8",
        lightship="test",
        source_digest="",
        calibration_text_digest="",
        quantization={},
        experts_without_tokens=[],
        files=describe_files(path),
    )
    write_manifest(path, manifest)
    return path


@pytest.fixture(scope="session")
def server(w4afp8_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """`lightship serve` at TP 2."""
    log_file = tmp_path_factory.mktemp("server") / "serve.log"
    with launched(w4afp8_dir, Serving(tp=2), log_file, name=MODEL) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Launched) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.endpoint.base_url, timeout=60, trust_env=False) as client:
        yield client
