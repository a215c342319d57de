"""Every way in which SGLang would serve nonsense without a word is a failed check that names the tensor."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightship.checkpoint import INDEX, MANIFEST
from lightship.errors import CheckpointError
from lightship.manifest import describe_files, read_manifest, write_manifest
from lightship.quant import findings, mispacking
from lightship.quant.mispacking import HYPOTHESES, SGLANG, Packing, is_offset_binary
from lightship.quant.rounding import rounding_for
from lightship.quant.verify import verify
from lightship.recipe import Quantization
from lightship.records import Check
from lightship.w4afp8 import dequantize_fp8_blocks, pack_int4, quantize_fp8_blocks, unpack_int4
from tests.tiny import write_fp8_checkpoint

LAYER = "model.layers.1.mlp"
EXPERT = f"{LAYER}.experts.2"
GATE, UP, DOWN = (f"{EXPERT}.{p}_proj.weight" for p in ("gate", "up", "down"))
ATTENTION = "model.layers.0.self_attn.o_proj.weight"
EXPERT_WEIGHTS = [f"{LAYER}.experts.{e}.{p}_proj.weight" for e in range(8) for p in ("gate", "up", "down")]
INPUT_SCALES = [f"{LAYER}.experts.{e}.{w}.input_scale" for e in range(8) for w in ("w1", "w2", "w3")]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(w4afp8: Path, tmp_path: Path) -> Path:
    return shutil.copytree(w4afp8, tmp_path / "copy")


@pytest.fixture
def foreign(copy: Path) -> Path:
    """A checkpoint as another tool leaves it: without our manifest."""
    (copy / MANIFEST).unlink()
    return copy


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change tensors, and make index and manifest agree with it, so that only the check in question can object."""
    tensors: Tensors = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    change(tensors)
    name = "model-00001-of-00001.safetensors"
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / name, metadata={"format": "pt"})
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    renew_manifest(path)


def change_config(path: Path, **values: object) -> None:
    """Set keys of config.json; None removes them."""
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    renew_manifest(path)


def renew_manifest(path: Path) -> None:
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        (path / MANIFEST).unlink()
        manifest.files.clear()
        manifest.files.update(describe_files(path))
        write_manifest(path, manifest)


def checks(path: Path, source: Path | None = None) -> dict[str, Check]:
    return {check.name: check for check in verify(path, source).checks}


def failures(path: Path, source: Path | None = None) -> dict[str, str]:
    return {name: check.detail for name, check in checks(path, source).items() if not check.passed}


def warnings(path: Path, source: Path | None = None) -> dict[str, str]:
    return {name: check.detail for name, check in checks(path, source).items() if check.outcome == "warn"}


def as_bf16(fp8: Path, out: Path) -> Path:
    """`fp8` as a BF16 release: no scales, no quantization block."""
    shutil.copytree(fp8, out)

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith("_scale_inv")]:
            weight = name.removesuffix("_scale_inv")
            tensors[weight] = dequantize_fp8_blocks(tensors[weight], tensors.pop(name)).bfloat16()

    change_tensors(out, change)
    change_config(out, quantization_config=None)
    return out


def test_a_written_checkpoint_passes_and_reports_its_errors(w4afp8: Path, fp8: Path) -> None:
    verification = verify(w4afp8, fp8)
    assert verification.passed
    assert [c.name for c in verification.checks if c.warned] == ["tensor parallel"], "256 / 8 is a quarter of a group"
    (layer,) = verification.layers
    assert 0.005 < layer.w13 < 0.012
    assert 0.005 < layer.w2 < 0.012


def test_without_a_manifest_it_is_another_tools_which_is_no_fault(foreign: Path, fp8: Path) -> None:
    assert verify(foreign, fp8).passed
    assert warnings(foreign)["manifest"] == "no lightship manifest: written by another tool"


def test_names_with_a_prefix_are_understood(foreign: Path, fp8: Path, tmp_path: Path) -> None:
    source = shutil.copytree(fp8, tmp_path / "source")

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)

    change_tensors(foreign, change)
    change_tensors(source, change)
    verification = verify(foreign, source)
    assert verification.passed, failures(foreign, source)
    assert [e.layer_name for e in verification.layers] == [f"language_model.{LAYER}"]


def test_a_bf16_source_is_compared_by_error(foreign: Path, fp8: Path, tmp_path: Path) -> None:
    source = as_bf16(fp8, tmp_path / "bf16")
    assert failures(foreign, source) == {}
    change_tensors(foreign, lambda t: t[f"{ATTENTION}_scale_inv"].mul_(1.5))
    assert f"{ATTENTION}: its FP8 blocks are 0.25" in failures(foreign, source)["untouched"]


# Input scales


def test_a_missing_input_scale_names_the_tensor(copy: Path) -> None:
    change_tensors(copy, lambda t: t.pop(f"{EXPERT}.w2.input_scale"))
    assert failures(copy) == {"input scales": f"{EXPERT}.w2.input_scale is missing: SGLang leaves it at 1.0"}


def test_an_input_scale_under_a_name_that_sglang_does_not_read_is_missing(copy: Path) -> None:
    change_tensors(copy, lambda t: t.update({f"{EXPERT}.down_proj.input_scale": t.pop(f"{EXPERT}.w2.input_scale")}))
    assert f"SGLang does not read {EXPERT}.down_proj.input_scale" in failures(copy)["input scales"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0.0, "is 0.0, not positive and finite"),
        (-0.5, "is -0.5, not positive and finite"),
        (torch.nan, "is nan, not positive and finite"),
        (torch.inf, "is inf, not positive and finite"),
        (1.0, "is 1.0, SGLang's placeholder"),
    ],
)
def test_an_unusable_input_scale_names_the_tensor(copy: Path, value: float, says: str) -> None:
    name = f"{EXPERT}.w2.input_scale"
    change_tensors(copy, lambda t: t[name].fill_(value))
    assert f"{name} {says}" in failures(copy)["input scales"]


def test_scales_that_were_never_calibrated_are_said_once_a_layer(foreign: Path) -> None:
    change_tensors(foreign, lambda t: [t[name].fill_(1.0) for name in INPUT_SCALES])
    check = checks(foreign)["input scales"]
    assert check.findings == [f"{LAYER}: every input scale is 1.0, a placeholder that was never calibrated"]
    assert not check.passed


def test_w1_and_w3_that_differ_are_refused_as_the_loader_refuses_them(foreign: Path) -> None:
    change_tensors(foreign, lambda t: t[f"{EXPERT}.w3.input_scale"].fill_(0.5))
    assert f"{EXPERT}: w1's input scale is" in failures(foreign)["input scales"]
    change_tensors(foreign, lambda t: t[f"{EXPERT}.w3.input_scale"].copy_(t[f"{EXPERT}.w1.input_scale"] + 1e-6))
    assert failures(foreign) == {}


def test_experts_with_scales_of_their_own_fail_in_ours_and_warn_in_anothers(copy: Path) -> None:
    change_tensors(copy, lambda t: t[f"{EXPERT}.w2.input_scale"].fill_(0.5))
    says = f"{LAYER}: w2 from"
    assert says in failures(copy)["one scale a layer"]
    (copy / MANIFEST).unlink()
    assert failures(copy) == {}
    assert says in warnings(copy)["one scale a layer"]
    assert "(expert 2)" in warnings(copy)["one scale a layer"]


@pytest.mark.parametrize("name", [f"{EXPERT}.w2.input_scale", f"{GATE}_scale_inv"])
def test_scales_that_bf16_does_not_hold_fail_in_ours_and_warn_in_anothers(copy: Path, name: str) -> None:
    change_tensors(copy, lambda t: t.update({name: t[name].float() * 1.0003}))
    assert name in failures(copy)["exact in bf16"]
    (copy / MANIFEST).unlink()
    assert failures(copy) == {}
    assert name in warnings(copy)["exact in bf16"]


# Values


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", [f"{UP}_scale_inv", f"{ATTENTION}_scale_inv", "model.norm.weight"])
def test_a_value_that_is_not_finite_names_the_tensor(copy: Path, name: str, value: float) -> None:
    change_tensors(copy, lambda t: t[name].view(-1)[:1].fill_(value))
    assert failures(copy) == {"finite": f"{name} has 1 values that are NaN or infinite"}


def test_a_nan_among_fp8_weights_names_the_tensor(copy: Path) -> None:
    change_tensors(copy, lambda t: t[ATTENTION].view(torch.uint8)[3, 5].fill_(0xFF))
    assert failures(copy) == {"finite": f"{ATTENTION} has 1 values that are NaN or infinite"}


@pytest.mark.parametrize("name", [GATE, f"{GATE}_scale_inv"])
def test_a_tensor_of_zeros_is_named_with_and_without_the_source(copy: Path, fp8: Path, name: str) -> None:
    change_tensors(copy, lambda t: t[name].zero_())
    assert failures(copy) == {"groups": f"{GATE}: 256 of 256 groups are all zeros"}
    assert failures(copy, fp8)["reconstruction"] == f"{GATE}: 1 > 0.1"


def test_one_group_of_zeros_warns_and_fails_if_the_source_has_something_there(copy: Path, fp8: Path) -> None:
    change_tensors(copy, lambda t: t[DOWN][7, 64:128].zero_())
    assert warnings(copy)["groups"] == f"{DOWN}: 1 of 256 groups are all zeros"
    assert "of which 1 are not zero in the source" in failures(copy, fp8)["groups"]


def test_identical_experts_are_named(copy: Path) -> None:
    other = f"{LAYER}.experts.5.up_proj.weight"
    change_tensors(copy, lambda t: (t[other].copy_(t[UP]), t[f"{other}_scale_inv"].copy_(t[f"{UP}_scale_inv"])))
    assert failures(copy) == {"distinct experts": f"{other} is identical to {UP}"}


# Names, dtypes and shapes


def test_a_wrong_shape_and_a_wrong_dtype_name_the_tensor(copy: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[GATE] = tensors[GATE][:, :-1]
        tensors[UP] = tensors[UP].float()
        del tensors[DOWN]

    change_tensors(copy, change)
    found = failures(copy)["experts"]
    assert f"{GATE} has shape [256, 63], not [256, 64]" in found
    assert f"{UP} is F32, not I8" in found
    assert f"{DOWN} is missing" in found


def test_groups_of_another_size_are_named(copy: Path) -> None:
    change_tensors(copy, lambda t: t.update({f"{DOWN}_scale_inv": t[f"{DOWN}_scale_inv"].repeat(1, 2)}))
    assert "one scale for 64 inputs, SGLang's group is 128" in failures(copy)["experts"]


def test_a_layer_without_experts_and_an_expert_too_many_are_named(copy: Path) -> None:
    change_config(copy, num_hidden_layers=3, n_routed_experts=7)
    found = failures(copy)["experts"]
    assert "layer 2 has no routed experts" in found
    assert f"{LAYER} has 8 routed experts, config.json says 7" in found


def test_a_fault_of_every_expert_is_counted_not_listed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "KEPT", 10)
    change_tensors(copy, lambda t: [t.pop(name) for name in INPUT_SCALES])
    check = checks(copy)["input scales"]
    assert (check.found, len(check.findings)) == (24, 10)
    assert check.detail.endswith("and 21 more")


def test_another_format_is_named(copy: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in EXPERT_WEIGHTS:
            tensors[f"{name}_packed"] = tensors.pop(name)
            tensors[f"{name}_scale"] = tensors.pop(f"{name}_scale_inv")

    change_tensors(copy, change)
    assert "compressed-tensors' pack-quantized format" in failures(copy)["experts"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{ATTENTION}_scale_inv"), f"{ATTENTION}_scale_inv is missing"),
        (lambda t: t.update({ATTENTION: t[ATTENTION].bfloat16()}), f"{ATTENTION} is BF16: SGLang reads every linear"),
        (
            lambda t: t.update({f"{ATTENTION}_scale_inv": torch.ones(1, 2).T}),
            f"{ATTENTION}_scale_inv has shape [2, 1], 128x128 blocks need [1, 2]: transposed",
        ),
        (
            lambda t: t.update({f"{LAYER}.gate.weight": t[f"{LAYER}.gate.weight"].to(torch.float8_e4m3fn)}),
            f"{LAYER}.gate.weight is F8_E4M3: SGLang reads it unquantized",
        ),
    ],
)
def test_other_linears_must_be_fp8_blocks_and_the_rest_not(
    copy: Path, change: Callable[[Tensors], object], says: str
) -> None:
    change_tensors(copy, change)
    assert says in failures(copy)["other linears"]


def test_a_degree_that_cannot_be_served_is_a_warning_and_none_at_all_a_fault(copy: Path) -> None:
    said = warnings(copy)["tensor parallel"]
    assert said.startswith("TP 1 yes, TP 2 NO, TP 4 NO, TP 8 NO, TP 16 NO, TP 32 NO; at TP 8: ")
    assert "256 / 8 = 32 is no multiple of 128 (the scales misalign without an error)" in said
    assert "2 heads / 8 (SGLang refuses it)" in said
    change_config(copy, intermediate_size=10944)
    gate = "model.layers.0.mlp.gate_proj.weight"
    said = f"no degree works: {gate}: 10944 is no multiple of 128 (SGLang refuses it)"
    assert failures(copy)["tensor parallel"] == said


def test_sizes_that_are_not_whole_groups_are_named(copy: Path) -> None:
    change_config(copy, hidden_size=192)
    change_tensors(copy, lambda t: t.update({GATE: torch.ones(256, 96, dtype=torch.int8)}))
    assert "hidden_size 192 is no multiple of 128" in failures(copy)["experts"]


# Configuration


@pytest.mark.parametrize(
    ("block", "algorithm", "says"),
    [
        ({"quant_method": "w4afp8"}, None, None),
        ({"quant_method": "w4afp8"}, "MIXED_PRECISION", None),
        (None, "MIXED_PRECISION", None),
        ({"quant_method": "fp8"}, None, "quant_method is 'fp8', not 'w4afp8'"),
        ({"quant_method": "fp8"}, "MIXED_PRECISION", "SGLang believes this block of config.json"),
        ({"quant_method": "w4afp8"}, "FP8", "says quant_algo 'FP8'"),
        (None, "W4A8_AWQ", "says quant_algo 'W4A8_AWQ'"),
        (None, None, "config.json has no quantization_config"),
    ],
)
def test_the_quantization_block(
    foreign: Path, block: dict[str, str] | None, algorithm: str | None, says: str | None
) -> None:
    change_config(foreign, quantization_config=block)
    if algorithm:
        quantization = {"quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": None}}
        (foreign / "hf_quant_config.json").write_text(json.dumps(quantization))
    found = failures(foreign)
    assert set(found) == ({"config"} if says else set())
    assert (says or "") in found.get("config", "")


def test_a_group_size_that_sglang_ignores_is_a_warning(foreign: Path) -> None:
    change_config(foreign, quantization_config={"quant_method": "w4afp8", "group_size": 64})
    assert "group_size 64 in config.json is ignored" in warnings(foreign)["config"]


# MTP


@pytest.fixture
def mtp(copy: Path) -> Path:
    """The checkpoint with an int4 MTP layer, as config.json says."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.1.")]:
            tensors[name.replace(".1.", ".2.", 1)] = tensors[name].clone()
        tensors |= {f"model.layers.2.{n}.weight": torch.ones(128).bfloat16() for n in ("eh_proj", "enorm", "hnorm")}

    change_tensors(copy, change)
    change_config(copy, num_nextn_predict_layers=1)
    return copy


def test_an_int4_mtp_layer_passes(mtp: Path) -> None:
    assert failures(mtp) == {}
    assert checks(mtp)["MTP layer"].detail == "1 asked for, 1 there, experts int4"


def test_an_mtp_layer_with_fp8_experts_does_not_load(mtp: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n.replace(".1.", ".2.", 1) for n in EXPERT_WEIGHTS]:
            rows, halves = tensors[name].shape
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8_blocks(torch.randn(rows, 2 * halves))

    change_tensors(mtp, change)
    found = failures(mtp)
    assert found["MTP layer"] == "model.layers.2.mlp's experts are F8_E4M3: SGLang loads every layer's experts as int4"
    assert "experts" not in found, "it is said once"


def test_an_mtp_projection_in_fp8_is_a_fault_that_says_what_to_do(mtp: Path) -> None:
    name = "model.layers.2.eh_proj.weight"

    def change(tensors: Tensors) -> None:
        tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8_blocks(torch.randn(128, 256))

    change_tensors(mtp, change)
    said = f"{name} is F8_E4M3: SGLang reads it unquantized, without its scales; write it again in BF16"
    assert failures(mtp)["other linears"].startswith(said)


def test_an_mtp_layer_and_config_that_disagree_are_named(mtp: Path, w4afp8: Path, tmp_path: Path) -> None:
    change_config(mtp, num_nextn_predict_layers=0)
    assert "beyond the model's 2 layers" in failures(mtp)["MTP layer"]
    without = shutil.copytree(w4afp8, tmp_path / "without")
    change_config(without, num_nextn_predict_layers=1)
    assert "layer 2 is not there: set num_nextn_predict_layers to 0" in failures(without)["MTP layer"]


def test_an_mtp_layer_that_was_left_out_is_not_missing(copy: Path, tmp_path: Path) -> None:
    source = write_fp8_checkpoint(tmp_path / "source", mtp=True)
    assert "untouched" not in failures(copy, source)
    change_tensors(copy, lambda t: t.update({"model.layers.2.enorm.weight": torch.ones(128).bfloat16()}))
    assert "model.layers.2.hnorm.weight of the source is missing" in "; ".join(
        checks(copy, source)["untouched"].findings
    ), "it was left out by half"


# Against the source


def test_a_changed_tensor_outside_the_experts_is_caught_against_the_source(copy: Path, fp8: Path) -> None:
    change_tensors(copy, lambda t: t["model.norm.weight"].mul_(2))
    assert failures(copy, fp8) == {"untouched": "model.norm.weight differs from the source"}


def test_a_lost_tensor_is_caught_against_the_source(copy: Path, fp8: Path) -> None:
    change_tensors(copy, lambda t: t.pop("model.norm.weight"))
    assert failures(copy, fp8) == {"untouched": "model.norm.weight of the source is missing"}


def test_weights_that_are_not_the_sources_fail_reconstruction(copy: Path, fp8: Path) -> None:
    change_tensors(copy, lambda t: t[f"{UP}_scale_inv"].mul_(4))
    assert f"{UP}: 8" in failures(copy, fp8)["reconstruction"]


def test_a_source_of_another_size_is_refused(w4afp8: Path, tmp_path: Path) -> None:
    other = write_fp8_checkpoint(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="is not the source of"):
        verify(w4afp8, other)


def test_a_quantized_source_is_refused(w4afp8: Path) -> None:
    with pytest.raises(CheckpointError, match="is I8; --against takes the FP8 or BF16 source"):
        verify(w4afp8, w4afp8)


def test_a_large_tensor_is_compared_in_blocks(copy: Path, fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightship.quant.expert_weights.BLOCK_ELEMENTS", 128 * 128)
    assert failures(copy, fp8) == {}
    change_tensors(copy, lambda t: t["lm_head.weight"][130, 0].add_(1))  # in the second block of three
    assert failures(copy, fp8) == {"untouched": "lm_head.weight differs from the source"}


# Packing


def stored(packing: Packing, packed: torch.Tensor) -> torch.Tensor:
    """A rightly packed weight, packed in another way; written apart from what recognizes it."""
    q = unpack_int4(packed)
    if packing.orientation in ("output", "transposed-output"):
        q = q.T
    low, high = q.chunk(2, dim=-1) if packing.halves else (q[:, 0::2], q[:, 1::2])
    low, high = (high, low) if packing.swapped else (low, high)
    if packing.offset:
        low, high = low + 8, high + 8
    result = ((high & 15) << 4) | (low & 15)
    return result.T if packing.orientation in ("output", "transposed") else result


@pytest.mark.parametrize("packing", [p for p in HYPOTHESES if p != SGLANG], ids=lambda p: p.describe())
def test_each_wrong_packing_is_recognized_against_the_source(copy: Path, fp8: Path, packing: Packing) -> None:
    def change(tensors: Tensors) -> None:
        for name in (GATE, DOWN):
            tensors[name] = stored(packing, tensors[name])
            if packing.scales_transposed:
                tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"].T

    change_tensors(copy, change)
    check = checks(copy, fp8)["packing"]
    assert check.findings == [f"{name}: {packing.describe()}" for name in (GATE, DOWN)]
    assert GATE in failures(copy, fp8)["reconstruction"]


def test_offset_binary_is_recognized_without_the_source(copy: Path) -> None:
    change_tensors(copy, lambda t: [t[name].bitwise_xor_(-120) for name in EXPERT_WEIGHTS])
    assert failures(copy)["packing"].startswith(f"{EXPERT_WEIGHTS[0]}: the nibbles hold q + 8 (offset binary)")


def test_a_transposed_file_is_recognized_by_its_shape_without_the_source(copy: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[GATE] = stored(Packing(orientation="output"), tensors[GATE])
        tensors[DOWN] = stored(Packing(orientation="output"), tensors[DOWN])
        tensors[f"{UP}_scale_inv"] = tensors[f"{UP}_scale_inv"].T

    change_tensors(copy, change)
    found = failures(copy)["experts"]
    assert f"{GATE} has shape [128, 128], not [256, 64]: packed along the output dimension, [out/2, in]" in found
    assert f"{DOWN} has shape [64, 256], not [128, 128]: packed along the output dimension, [out/2, in]" in found
    assert f"{UP}_scale_inv has shape [1, 256], not [256, 1]: the scales are transposed" in found


def test_exchanged_gate_and_up_are_recognized(copy: Path, fp8: Path) -> None:
    def change(tensors: Tensors) -> None:
        for suffix in ("", "_scale_inv"):
            tensors[GATE + suffix], tensors[UP + suffix] = tensors[UP + suffix], tensors[GATE + suffix]

    change_tensors(copy, change)
    assert checks(copy, fp8)["packing"].findings == [
        f"{GATE}: it is the source's up_proj: gate and up are exchanged",
        f"{UP}: it is the source's gate_proj: gate and up are exchanged",
    ]


def test_experts_in_each_others_place_are_recognized(copy: Path, fp8: Path) -> None:
    def change(tensors: Tensors) -> None:
        for rest in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
            for suffix in ("", "_scale_inv"):
                a, b = f"{EXPERT}.{rest}{suffix}", f"{LAYER}.experts.5.{rest}{suffix}"
                tensors[a], tensors[b] = tensors[b], tensors[a]

    change_tensors(copy, change)
    assert failures(copy) == {}, "only the source can tell"
    assert checks(copy, fp8)["packing"].findings == [
        f"{LAYER}.experts.{here}.{p}_proj.weight: it is {p}_proj of the source's expert {there}: experts have changed "
        "places"
        for here, there in ((2, 5), (5, 2))
        for p in ("gate", "up", "down")
    ]


def test_group_scales_that_were_never_filled_in_are_named_without_the_source(copy: Path) -> None:
    change_tensors(copy, lambda t: t[f"{UP}_scale_inv"].fill_(1.0))
    said = f"{UP}_scale_inv: every group scale is 1.0, a placeholder that was never filled in"
    assert failures(copy) == {"groups": said}


def test_weights_that_nothing_explains_do_not_try_every_packing_for_ever(
    copy: Path, fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mispacking, "PATIENCE", 1)
    tried = []
    monkeypatch.setattr(mispacking, "relative_error", lambda *_: tried.append(1) or 1.0)
    change_tensors(copy, lambda t: [t[f"{name}_scale_inv"].mul_(4) for name in EXPERT_WEIGHTS])
    assert checks(copy, fp8)["reconstruction"].found == 24
    assert 0 < len(tried) <= len(HYPOTHESES)


@pytest.mark.parametrize("method", ["absmax", "mse"])
@pytest.mark.parametrize("distribution", ["normal", "uniform", "heavy-tailed"])
def test_no_rounding_of_ours_looks_like_offset_binary(method: str, distribution: str) -> None:
    draw = torch.Generator().manual_seed(0)
    w_OI = torch.randn(64, 512, generator=draw)
    if distribution == "uniform":
        w_OI = torch.rand(64, 512, generator=draw) - 0.5
    elif distribution == "heavy-tailed":
        w_OI = w_OI / torch.randn(64, 512, generator=draw).abs().clamp_min(0.2)
    packed = pack_int4(rounding_for(Quantization(method=method))(w_OI, None).q_OI)
    assert not is_offset_binary(packed)
    assert is_offset_binary(packed ^ -120) == (distribution != "uniform"), "uniform weights cannot be told apart"


# Files


def test_tensors_that_another_tool_wrote_at_odd_offsets_are_read(foreign: Path, fp8: Path) -> None:
    (shard,) = foreign.glob("*.safetensors")
    data = shard.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    body, offset = [b"x"], 1
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            body.append(data[8 + length + begin : 8 + length + end])
            entry["data_offsets"] = [offset, offset + end - begin]
            offset += end - begin
    header["a"] = {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(body))
    index = json.loads((foreign / INDEX).read_text())
    index["weight_map"]["a"] = shard.name
    (foreign / INDEX).write_text(json.dumps(index))
    verification = verify(foreign, fp8)
    assert verification.passed, failures(foreign, fp8)
    assert warnings(foreign, fp8)["untouched"] == "a is not in the source"


def test_a_changed_file_is_caught_by_the_manifest(copy: Path) -> None:
    with (copy / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert "tokenizer.json has changed since it was quantized" in failures(copy)["manifest"]


def test_a_missing_shard_is_a_failed_check_not_a_crash(copy: Path) -> None:
    for shard in copy.glob("*.safetensors"):
        shard.unlink()
    assert "is missing" in failures(copy)["opens"]
