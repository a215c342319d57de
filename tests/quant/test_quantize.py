"""The written checkpoint is whole or absent, the same every time, and all but the experts is the source's."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightship.causal_lm import load_causal_lm
from lightship.checkpoint import INDEX, MANIFEST, Checkpoint
from lightship.errors import CheckpointError, LightshipError
from lightship.files import digest_of_file
from lightship.manifest import check_files, read_manifest
from lightship.quant.calibrate import calibrate
from lightship.quant.plan import plan_quantization
from lightship.quant.quantize import quantize
from lightship.quant.verify import verify
from lightship.recipe import CalibrationText, Method, Quantization
from lightship.records import Calibration
from tests.conftest import unseen
from tests.tiny import write_fp8_checkpoint


def test_the_same_inputs_give_the_same_bytes(quantize_to: Callable[..., Path], tmp_path: Path) -> None:
    first, second = quantize_to(tmp_path / "a", method="gptq"), quantize_to(tmp_path / "b", method="gptq")
    assert digest_of_file(first / MANIFEST) == digest_of_file(second / MANIFEST)


def test_config_names_the_method_and_companions_are_copied(fp8: Path, w4afp8: Path) -> None:
    config = json.loads((w4afp8 / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "w4afp8"
    assert (w4afp8 / "tokenizer.json").read_bytes() == (fp8 / "tokenizer.json").read_bytes()
    check_files(w4afp8)


def test_shards_are_bounded_and_indexed(fp8: Path, calibrated: tuple[Calibration, Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(fp8)
    limit = 200_000
    out = tmp_path / "out"
    plan = plan_quantization(checkpoint)
    quantize(checkpoint, plan, *calibrated, Quantization(method="absmax"), out, unseen, shard_bytes=limit)
    written = Checkpoint.open(out)
    assert len(written.shards) > 4
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == written.nbytes == plan.bytes_after
    for shard in written.shards:
        assert sum(t.nbytes for t in written.tensors.values() if t.shard == shard) <= limit


def test_a_nan_weight_is_named_and_nothing_is_left_behind(
    broken: Path, calibrated: tuple[Calibration, Path], tmp_path: Path
) -> None:
    name = poison(broken)
    checkpoint = Checkpoint.open(broken)
    out = tmp_path / "out" / "w4afp8"
    with pytest.raises(CheckpointError, match=f"the tensor {name} has 1 values that are NaN"):
        quantize(checkpoint, plan_quantization(checkpoint), *calibrated, Quantization(), out, unseen)
    assert list(out.parent.iterdir()) == []


def test_a_nan_weight_is_named_when_the_model_is_loaded(broken: Path) -> None:
    with pytest.raises(CheckpointError, match=f"the tensor {poison(broken)} has 1 values that are NaN"):
        load_causal_lm(broken)


def test_an_existing_directory_is_not_overwritten(w4afp8: Path, quantize_to: Callable[..., Path]) -> None:
    with pytest.raises(LightshipError, match="exists; remove it or name another directory"):
        quantize_to(w4afp8)


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_an_expert_that_saw_no_token_is_recorded(
    fp8: Path, calibrated: tuple[Calibration, Path], tmp_path: Path, method: Method
) -> None:
    layer = calibrated[0].layers[0]
    tokens = {
        scene: [0 if e == 5 else n for e, n in enumerate(counts)] for scene, counts in layer.expert_tokens.items()
    }
    starved = msgspec.structs.replace(calibrated[0], layers=[msgspec.structs.replace(layer, expert_tokens=tokens)])
    hessians = load_file(calibrated[1] / "hessians.safetensors")
    left = {k: v for k, v in hessians.items() if not k.startswith(f"{layer.layer_name}.5.")}
    save_file(left, tmp_path / "hessians.safetensors")
    checkpoint = Checkpoint.open(fp8)
    out = tmp_path / "out"
    plan = plan_quantization(checkpoint)
    record = quantize(checkpoint, plan, starved, tmp_path, Quantization(method=method), out, unseen)
    assert record.experts_without_tokens == [f"{layer.layer_name}.experts.5"]
    assert read_manifest(out).experts_without_tokens == [f"{layer.layer_name}.experts.5"]


def test_an_mtp_layers_experts_become_int4_with_the_last_layers_input_scales(
    text: CalibrationText, tmp_path: Path
) -> None:
    source = write_fp8_checkpoint(tmp_path / "mtp", mtp=True)
    checkpoint = Checkpoint.open(source)
    plan = plan_quantization(checkpoint)
    assert plan.expert_layers == ["model.layers.1.mlp", "model.layers.2.mlp"]
    calibration = calibrate(source, text, tmp_path, unseen)
    out = tmp_path / "out"
    record = quantize(checkpoint, plan, calibration, tmp_path, Quantization(method="gptq"), out, unseen)
    assert record.layers_without_calibration == ["model.layers.2.mlp"]
    verification = verify(out, source)
    assert verification.passed, verification.checks
    assert [e.layer_name for e in verification.layers] == plan.expert_layers
    reader = Checkpoint.open(out).reader()
    last, mtp = (reader.read(f"model.layers.{n}.mlp.experts.0.w2.input_scale") for n in (1, 2))
    assert torch.equal(last, mtp)
    assert load_causal_lm(out)(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_calibration_of_another_checkpoint_is_refused(calibrated: tuple[Calibration, Path], tmp_path: Path) -> None:
    other = write_fp8_checkpoint(tmp_path / "deeper", num_hidden_layers=3)
    checkpoint = Checkpoint.open(other)
    with pytest.raises(LightshipError, match=r"the calibration lacks model\.layers\.2\.mlp"):
        quantize(checkpoint, plan_quantization(checkpoint), *calibrated, Quantization(), tmp_path / "out", unseen)
    assert not (tmp_path / "out").exists()


def test_finer_rounding_moves_the_model_less(
    fp8: Path, w4afp8: Path, quantize_to: Callable[..., Path], tmp_path: Path
) -> None:
    ids = torch.randint(2, 258, (2, 128), generator=torch.Generator().manual_seed(0))
    source = load_causal_lm(fp8)(ids).logits.log_softmax(-1)

    def divergence(path: Path) -> float:
        return float((source.exp() * (source - load_causal_lm(path)(ids).logits.log_softmax(-1))).sum(-1).mean())

    assert 0 < divergence(w4afp8) < divergence(quantize_to(tmp_path / "absmax", method="absmax"))


def poison(path: Path) -> str:
    """Put a NaN into one expert's weight; returns the tensor's name."""
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    shard = path / json.loads((path / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name].view(torch.uint8)[5, 7] = 0x7F
    save_file(tensors, shard, metadata={"format": "pt"})
    return name
