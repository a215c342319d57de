"""The written checkpoint is whole or absent, the same every time, and all but the experts is the source's."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightship.causal_lm import load_causal_lm, load_tokenizer
from lightship.checkpoint import INDEX, MANIFEST, Checkpoint
from lightship.errors import CheckpointError, LightshipError
from lightship.files import digest_of_file, read_json
from lightship.manifest import check_files, read_manifest
from lightship.quant.plan import plan_quantization
from lightship.quant.quantize import CALIBRATION, take_finished, work_directory
from lightship.quant.verify import verify
from lightship.recipe import CalibrationText, Method, Quantization, Rule, TextSource
from lightship.records import Calibration
from lightship.text import read_scenes
from tests.conftest import quantize_checkpoint, write_lines
from tests.tiny import write_fp8_checkpoint

LAYER = "model.layers.1.mlp"


def test_the_same_inputs_give_the_same_bytes(quantize_to: Callable[..., Path], tmp_path: Path) -> None:
    first, second = quantize_to(tmp_path / "a", method="gptq"), quantize_to(tmp_path / "b", method="gptq")
    assert digest_of_file(first / MANIFEST) == digest_of_file(second / MANIFEST)


def test_hidden_states_on_disk_give_the_same_bytes_as_in_memory(
    fp8: Path, text: CalibrationText, tmp_path: Path
) -> None:
    for name, memory in (("memory", 1 << 30), ("disk", 0)):
        quantize_checkpoint(fp8, tmp_path / name, text, Quantization(), stash_memory=memory)
    assert digest_of_file(tmp_path / "memory" / MANIFEST) == digest_of_file(tmp_path / "disk" / MANIFEST)


def test_a_published_checkpoint_tells_the_record_that_its_maker_gave(
    fp8: Path, text: CalibrationText, tmp_path: Path
) -> None:
    made = quantize_checkpoint(fp8, tmp_path / "out", text, Quantization(method="absmax"))
    found = take_finished(tmp_path / "out")
    assert msgspec.structs.replace(found, seconds=made.seconds, experts_resumed=0) == made


def test_config_names_the_method_and_companions_are_copied(fp8: Path, w4afp8: Path) -> None:
    config = json.loads((w4afp8 / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "w4afp8"
    assert (w4afp8 / "tokenizer.json").read_bytes() == (fp8 / "tokenizer.json").read_bytes()
    check_files(w4afp8)


def test_shards_are_bounded_and_indexed(fp8: Path, text: CalibrationText, tmp_path: Path) -> None:
    limit, out = 200_000, tmp_path / "out"
    quantize_checkpoint(fp8, out, text, Quantization(method="absmax"), shard_bytes=limit)
    written = Checkpoint.open(out)
    assert len(written.shards) > 4
    planned = plan_quantization(Checkpoint.open(fp8)).bytes_after
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == written.nbytes == planned
    for shard in written.shards:
        assert sum(t.nbytes for t in written.tensors.values() if t.shard == shard) <= limit


def test_every_token_is_counted_once_for_each_expert_it_chose(w4afp8: Path) -> None:
    calibration = read_json(w4afp8 / CALIBRATION, Calibration)
    (layer,) = calibration.layers
    assert calibration.tokens == {"prose": 2048, "code": 2048}
    for scene, tokens in calibration.tokens.items():
        assert sum(layer.expert_tokens[scene]) == 2 * tokens
    assert [e.tokens for e in layer.experts] == layer.tokens_of_experts()


def test_a_nan_weight_is_named(broken: Path, text: CalibrationText, tmp_path: Path) -> None:
    name = poison(broken)
    with pytest.raises(CheckpointError, match=f"the tensor {name} has 1 values that are NaN"):
        quantize_checkpoint(broken, tmp_path / "out", text, Quantization())
    assert not (tmp_path / "out").exists()


def test_a_nan_weight_is_named_when_the_model_is_loaded(broken: Path) -> None:
    with pytest.raises(CheckpointError, match=f"the tensor {poison(broken)} has 1 values that are NaN"):
        load_causal_lm(broken)


def test_an_existing_directory_is_not_overwritten(w4afp8: Path, quantize_to: Callable[..., Path]) -> None:
    with pytest.raises(LightshipError, match="exists; remove it or name another directory"):
        quantize_to(w4afp8)


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_an_expert_that_saw_no_token_is_recorded(fp8: Path, tmp_path: Path, method: Method) -> None:
    one_token = write_lines(tmp_path / "short.jsonl", ["x" * 16])
    text = CalibrationText(sources=[TextSource(scene="s", path=str(one_token))], tokens_per_scene=2, sequence_tokens=2)
    out = tmp_path / "out"
    quantize_checkpoint(fp8, out, text, Quantization(method=method))
    calibration = read_json(out / CALIBRATION, Calibration)
    idle = [e for e, tokens in enumerate(calibration.layers[0].tokens_of_experts()) if not tokens]
    assert idle
    assert calibration.without_tokens == [f"{LAYER}.experts.{e}" for e in idle]
    assert read_manifest(out).experts_without_tokens == calibration.without_tokens
    if method == "gptq":
        assert {calibration.layers[0].experts[e].how for e in idle} == {"mse, no tokens"}


def test_starved_experts_are_topped_up_and_named(quantize_to: Callable[..., Path], tmp_path: Path) -> None:
    out = quantize_to(tmp_path / "out", method="gptq", token_floor=1000)
    calibration = read_json(out / CALIBRATION, Calibration)
    (layer,) = calibration.layers
    few = {e for e, tokens in enumerate(layer.tokens_of_experts()) if tokens < 1000}
    assert 0 < len(few) < 8
    assert {e.expert for e in layer.experts if e.how == "gptq, topped up"} == few
    assert {e.expert for e in layer.experts if e.how == "gptq"} == set(range(8)) - few
    assert calibration.starved == [f"{LAYER}.experts.{e}" for e in sorted(few)]


def test_a_rule_rounds_named_layers_otherwise(quantize_to: Callable[..., Path], tmp_path: Path) -> None:
    out = quantize_to(tmp_path / "out", method="mse", rules=[Rule(layers=[1], method="absmax")])
    assert {e.how for e in read_json(out / CALIBRATION, Calibration).layers[0].experts} == {"absmax"}


def test_a_rule_for_large_errors_keeps_the_better_rounding(quantize_to: Callable[..., Path], tmp_path: Path) -> None:
    plain = quantize_to(tmp_path / "plain", method="mse")
    ruled = quantize_to(tmp_path / "ruled", method="mse", rules=[Rule(output_error_above=1e-9, method="gptq")])
    experts = read_json(ruled / CALIBRATION, Calibration).layers[0].experts
    assert all(e.how.startswith("gptq by rule 1") for e in experts)
    assert digest_of_file(plain / MANIFEST) != digest_of_file(ruled / MANIFEST)


@pytest.mark.parametrize("replay", ["quantized", "original"])
def test_the_stream_computes_what_the_whole_model_computes(text: CalibrationText, tmp_path: Path, replay: str) -> None:
    """Layer 2's input scale rests on layer 1's replay: it is the whole model's, quantized or original."""
    import msgspec

    source = write_fp8_checkpoint(tmp_path / "deep", num_hidden_layers=3)
    out = tmp_path / "out"
    quantize_checkpoint(source, out, msgspec.structs.replace(text, replay=replay), Quantization(method="mse"))
    layer = read_json(out / CALIBRATION, Calibration).layers[1]
    model = load_causal_lm(out if replay == "quantized" else source)
    seen: list[torch.Tensor] = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for sequences in read_scenes(text, load_tokenizer(source)).values():
        model(torch.stack(sequences))
    assert layer.w13_input.amax == pytest.approx(max(float(x.abs().max()) for x in seen), rel=1e-3)


def test_an_mtp_layer_is_calibrated_and_its_experts_become_int4(text: CalibrationText, tmp_path: Path) -> None:
    source = write_fp8_checkpoint(tmp_path / "mtp", mtp=True)
    plan = plan_quantization(Checkpoint.open(source))
    assert plan.expert_layers == ["model.layers.1.mlp", "model.layers.2.mlp"]
    out = tmp_path / "out"
    quantize_checkpoint(source, out, text, Quantization(method="gptq", token_floor=0))
    calibration = read_json(out / CALIBRATION, Calibration)
    mtp = calibration.layers[1]
    assert mtp.layer_name == "model.layers.2.mlp"
    assert sum(mtp.tokens_of_experts()) == 2 * 4096
    assert "gptq" in {e.how for e in mtp.experts}
    verification = verify(out, source)
    assert verification.passed, verification.checks
    assert [e.layer_name for e in verification.layers] == plan.expert_layers
    assert load_causal_lm(out)(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_finer_rounding_moves_the_model_less(
    fp8: Path, w4afp8: Path, quantize_to: Callable[..., Path], tmp_path: Path
) -> None:
    ids = torch.randint(2, 258, (2, 128), generator=torch.Generator().manual_seed(0))
    source = load_causal_lm(fp8)(ids).logits.log_softmax(-1)

    def divergence(path: Path) -> float:
        return float((source.exp() * (source - load_causal_lm(path)(ids).logits.log_softmax(-1))).sum(-1).mean())

    assert 0 < divergence(w4afp8) < divergence(quantize_to(tmp_path / "absmax", method="absmax"))


def test_activations_that_are_not_finite_name_the_layer(broken: Path, text: CalibrationText, tmp_path: Path) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    change_tensor(broken, name, lambda t: t.fill_(3e38))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp are NaN or infinite on the calibration text"):
        quantize_checkpoint(broken, tmp_path / "out", text, Quantization(method="mse"))


def test_what_is_not_finished_lies_beside_the_name_of_the_result(
    fp8: Path, text: CalibrationText, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(fp8, out, text, Quantization(method="absmax"))
    assert out.is_dir()
    assert not work_directory(out).exists() or not list(work_directory(out).glob("*"))


def poison(path: Path) -> str:
    """Put a NaN into one expert's weight; returns the tensor's name."""
    name = f"{LAYER}.experts.3.up_proj.weight"

    def nan(tensor: torch.Tensor) -> None:
        tensor.view(torch.uint8)[5, 7] = 0x7F

    change_tensor(path, name, nan)
    return name


def change_tensor(path: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    shard = path / json.loads((path / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    change(tensors[name])
    save_file(tensors, shard, metadata={"format": "pt"})
