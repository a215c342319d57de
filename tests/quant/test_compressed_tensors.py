"""The compressed-tensors library reads from the converted checkpoint what lightship reads from the W4AFP8 one."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file

from lightship.causal_lm import load_causal_lm
from lightship.checkpoint import EXPERT, INDEX, MANIFEST, Checkpoint
from lightship.errors import CheckpointError, LightshipError
from lightship.manifest import check_files, read_manifest
from lightship.quant.compressed_tensors import convert
from lightship.w4afp8 import dequantize_fp8_blocks, dequantize_int4, unpack_int4
from tests.commands import lightship, refusal
from tests.conftest import unseen

NAME = "model.layers.1.mlp.experts.3.up_proj.weight"
LINEAR = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"


@pytest.fixture(scope="module")
def converted(w4afp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`w4afp8` as compressed-tensors; never change it."""
    out = tmp_path_factory.mktemp("converted") / "tiny"
    convert(w4afp8, out, unseen)
    return out


@pytest.fixture
def changed(w4afp8: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of `w4afp8` with some tensors replaced, or removed where the new value is None."""

    def change(**tensors: torch.Tensor | None) -> Path:
        copy = shutil.copytree(w4afp8, tmp_path / "changed")
        (shard,) = copy.glob("*.safetensors")
        kept = {k: v for k, v in (load_file(shard) | tensors).items() if v is not None}
        save_file(kept, shard, metadata={"format": "pt"})
        (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(kept, shard.name)}))
        return copy

    return change


def read(path: Path, *names: str) -> list[torch.Tensor]:
    reader = Checkpoint.open(path).reader()
    return [reader.read(name) for name in names]


def scheme_of(path: Path, group: str) -> QuantizationScheme:
    """The group of config.json, as the library parses it."""
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups[group]
    assert isinstance(scheme, QuantizationScheme)
    return scheme


def decompress(path: Path, name: str, group: str, *parts: str) -> torch.Tensor:
    """A weight as the library's own compressor of that group restores it."""
    scheme = scheme_of(path, group)
    state = dict(zip(parts, read(path, *(f"{name.removesuffix('weight')}{part}" for part in parts)), strict=True))
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(state, scheme)["weight"]


def decompress_int4(path: Path, name: str = NAME) -> torch.Tensor:
    return decompress(path, name, "group_1", "weight_packed", "weight_scale", "weight_shape")


def test_the_library_restores_every_expert_bit_for_bit(w4afp8: Path, converted: Path) -> None:
    names = [n for n in Checkpoint.open(w4afp8).tensors if EXPERT.match(n) and n.endswith(".weight")]
    assert len(names) == 24
    for name in names:
        ours = dequantize_int4(*read(w4afp8, name, f"{name}_scale_inv"), dtype=torch.bfloat16)
        assert torch.equal(decompress_int4(converted, name), ours), name


def test_the_library_restores_fp8_linears_bit_for_bit_with_blocks_cut_short(w4afp8: Path, converted: Path) -> None:
    q_OI, scale_inv = read(w4afp8, LINEAR, f"{LINEAR}_scale_inv")
    assert q_OI.shape[0] % 128
    theirs = decompress(converted, LINEAR, "group_0", "weight", "weight_scale")
    assert torch.equal(theirs, dequantize_fp8_blocks(q_OI, scale_inv))


def test_negative_scales_and_minus_eight_survive(w4afp8: Path, changed: Callable[..., Path], tmp_path: Path) -> None:
    packed, scale_OG = read(w4afp8, NAME, f"{NAME}_scale_inv")
    packed[0] = -0x78  # -8 in both nibbles
    source = changed(**{NAME: packed, f"{NAME}_scale_inv": -scale_OG.abs()})
    convert(source, tmp_path / "out", unseen)
    restored = decompress_int4(tmp_path / "out")
    assert torch.equal(restored, dequantize_int4(packed, -scale_OG.abs(), torch.bfloat16))
    assert (restored[0] > 0).all()
    assert (unpack_int4(packed)[0] == -8).all()


def test_float32_scales_become_the_bf16_that_the_loader_would_keep(
    w4afp8: Path, changed: Callable[..., Path], tmp_path: Path
) -> None:
    (scale_OG,) = read(w4afp8, f"{NAME}_scale_inv")
    finer = scale_OG.float() * 1.001
    convert(changed(**{f"{NAME}_scale_inv": finer}), tmp_path / "out", unseen)
    (written,) = read(tmp_path / "out", f"{NAME}_scale")
    assert torch.equal(written, finer.bfloat16())


def test_all_else_is_the_sources_and_input_scales_are_gone(w4afp8: Path, converted: Path) -> None:
    before, after = Checkpoint.open(w4afp8), Checkpoint.open(converted)
    plain = {n for n in before.tensors if not EXPERT.match(n) and not n.endswith((".input_scale", "_scale_inv"))}
    assert plain <= set(after.tensors)
    assert not [n for n in after.tensors if n.endswith((".input_scale", "_scale_inv"))]
    old, new = before.reader(), after.reader()
    assert all(torch.equal(old.read(n).view(torch.uint8), new.read(n).view(torch.uint8)) for n in plain)
    assert (converted / "tokenizer.json").read_bytes() == (w4afp8 / "tokenizer.json").read_bytes()


def test_transformers_loads_the_whole_model_and_says_the_same(w4afp8: Path, converted: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.randint(2, 258, (2, 64), generator=torch.Generator().manual_seed(0))
    ours = load_causal_lm(w4afp8)(ids).logits.log_softmax(-1)
    with torch.no_grad():
        theirs = model(ids).logits.float().log_softmax(-1)
    # transformers leaves the experts' activations unquantized and their weights in bf16.
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 1e-3


def test_a_fused_projection_of_an_engine_is_fp8_and_no_expert_is(converted: Path) -> None:
    fp8, int4 = (scheme_of(converted, group).targets for group in ("group_0", "group_1"))

    def matches(targets: list[str], module: str) -> bool:
        return any(re.match(target[3:], module) for target in targets if target.startswith("re:"))

    fused = ["self_attn.fused_qkv_a_proj_with_mqa", "mlp.gate_up_proj", "mlp.shared_experts.gate_up_proj"]
    assert all(matches(fp8, f"model.layers.1.{name}") for name in fused)
    assert not matches(fp8, "model.layers.1.mlp.experts.3.up_proj")
    assert matches(int4, "model.decoder.mlp.experts.3.up_proj")
    assert "Linear" in int4, "SGLang looks up the group size there"
    assert not any("experts" in target for target in fp8), "transformers would take the group for the experts'"
    ignored = json.loads((converted / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignored
    assert matches(ignored, "model.layers.1.mlp.gate")
    assert not matches(ignored, "model.layers.1.mlp.gate_up_proj")


def test_every_tensor_begins_at_a_multiple_of_its_width(changed: Callable[..., Path], tmp_path: Path) -> None:
    convert(changed(an_odd_one=torch.zeros(3, dtype=torch.uint8)), tmp_path / "out", unseen, shard_bytes=300_000)
    widths = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        content = shard.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        assert end % 8 == 0
        header = json.loads(content[8:end])
        del header["__metadata__"]
        assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in header.values())


def test_shards_are_bounded_indexed_and_in_the_manifest(w4afp8: Path, tmp_path: Path) -> None:
    out, limit = tmp_path / "out", 100_000
    written = convert(w4afp8, out, unseen, shard_bytes=limit)
    checkpoint = Checkpoint.open(out)
    assert len(checkpoint.shards) > 4
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == checkpoint.nbytes == written
    for shard in checkpoint.shards:
        assert sum(t.nbytes for t in checkpoint.tensors.values() if t.shard == shard) <= limit
    check_files(out)
    manifest, source = read_manifest(out), read_manifest(w4afp8)
    assert manifest.format == "compressed-tensors"
    assert (manifest.source_digest, manifest.quantization) == (source.source_digest, source.quantization)
    assert torch.equal(decompress_int4(out), dequantize_int4(*read(w4afp8, NAME, f"{NAME}_scale_inv"), torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (NAME, None, "has no tensor {name}"),
        (f"{NAME}_scale_inv", None, "has no tensor {name}"),
        (
            NAME,
            torch.zeros(256, 128).to(torch.float8_e4m3fn),
            r"the tensor {name} is F8_E4M3 \[256, 128\], W4AFP8 has I8",
        ),
        (f"{NAME}_scale_inv", torch.ones(256, 2).bfloat16(), r"{name} is BF16 \[256, 2\], .*F32 \[256, 1\] there"),
        (
            f"{NAME}_scale_inv",
            torch.full((256, 1), torch.nan).bfloat16(),
            "the tensor {name} has 256 values that are NaN",
        ),
        (f"{NAME}_scale_inv", torch.full((256, 1), 3.4e38), "the tensor {name} exceeds bf16's range"),
        (f"{LINEAR}_scale_inv", None, "has no tensor {name}"),
        (f"{LINEAR}_scale_inv", torch.ones(1, 1), r"{name} is F32 \[1, 1\], .*F32 \[2, 1\]"),
    ],
)
def test_a_bad_tensor_is_named_and_nothing_is_left_behind(
    changed: Callable[..., Path], tmp_path: Path, name: str, value: torch.Tensor | None, said: str
) -> None:
    out = tmp_path / "place" / "out"
    with pytest.raises(CheckpointError, match=said.format(name=re.escape(name))):
        convert(changed(**{name: value}), out, unseen)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_an_unfinished_directory_is_refused(w4afp8: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(w4afp8, tmp_path / "copy")
    (copy / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"has no lightship\.json"):
        convert(copy, tmp_path / "out", unseen)


def test_an_existing_directory_is_not_overwritten(w4afp8: Path, tmp_path: Path) -> None:
    with pytest.raises(LightshipError, match="exists; remove it or name another directory"):
        convert(w4afp8, tmp_path, unseen)


def test_the_command_converts_and_refuses_an_fp8_checkpoint(fp8: Path, w4afp8: Path, tmp_path: Path) -> None:
    done = lightship("convert", w4afp8, tmp_path / "out", "--to", "compressed-tensors")
    assert done.returncode == 0, done.stderr
    check_files(tmp_path / "out")
    said = refusal("convert", fp8, tmp_path / "other", "--to", "compressed-tensors")
    assert "config.json: quant_method is 'fp8', not 'w4afp8'" in said
