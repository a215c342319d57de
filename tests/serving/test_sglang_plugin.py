"""The plugin in a fake SGLang of each version: what it takes over, what it refuses to load, what it says of itself."""

import logging
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightship.errors import CheckpointError, LightshipError, ServingError
from lightship.experts import TensorParallel, W4AFP8Experts
from tests.serving.fake_sglang import (
    Backend,
    Fp8LinearMethod,
    FusedMoE,
    ReferenceExperts,
    W4AFp8MoEMethod,
    load,
    load_plugin,
    sglang,
)

__all__ = ["sglang"]

ROOT = Path(__file__).parents[2]
PREFIX = "model.layers.1.mlp.experts"
EXPERTS, HIDDEN, INTERMEDIATE, TOP = 8, 256, 512, 4
Tensors = dict[str, torch.Tensor]


def checkpoint(prefix: str = PREFIX) -> Tensors:
    """One layer of a W4AFP8 checkpoint, with scales that make an output of about one."""
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for expert in range(EXPERTS):
        for name, outputs, inputs in (
            ("gate_proj", INTERMEDIATE, HIDDEN),
            ("up_proj", INTERMEDIATE, HIDDEN),
            ("down_proj", HIDDEN, INTERMEDIATE),
        ):
            weight = torch.randint(-128, 128, (outputs, inputs // 2), dtype=torch.int8, generator=generator)
            scale = (torch.rand(outputs, inputs // 128, generator=generator) + 0.5) * inputs**-0.5 / 4.6
            tensors[f"{prefix}.{expert}.{name}.weight"] = weight
            tensors[f"{prefix}.{expert}.{name}.weight_scale_inv"] = scale.bfloat16()
        for name, value in (("w1", 0.01), ("w3", 0.01), ("w2", 0.02)):
            tensors[f"{prefix}.{expert}.{name}.input_scale"] = torch.tensor(value, dtype=torch.bfloat16)
    return tensors


def layer_of(fake: types.SimpleNamespace, **arguments: object) -> FusedMoE:
    """A layer of the checkpoint's sizes, made as SGLang makes it."""
    sizes = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    return FusedMoE(version=fake.version, quant_config=fake.W4AFp8Config(), **(sizes | arguments))


@pytest.fixture
def plugin(sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """SGLang with the plugin on."""
    monkeypatch.setenv("LIGHTSHIP_MOE", "on")
    load_plugin(sglang)
    return sglang


def is_taken(layer: FusedMoE) -> bool:
    return type(layer.quant_method).__name__ == "LightshipW4AFp8MoEMethod"


# How SGLang finds it, and what it may bring along.


def test_the_distribution_names_the_entry_point() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["sglang.srt.plugins"]
    assert callable(pkgutil.resolve_name(points["lightship"]))


def test_the_plugin_imports_torch_and_the_standard_library_alone() -> None:
    code = """
import importlib, importlib.abc, sys
import torch
allowed = set(sys.modules) | set(sys.stdlib_module_names)
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in {"lightship", "torch"} and top not in allowed:
            raise ImportError(f"the plugin imports {name}")
sys.meta_path.insert(0, Refuse())
for name in ("settings", "entry", "takeover", "arrivals", "method", "activity"):
    importlib.import_module(f"lightship.serving.sglang_plugin.{name}")
print(sorted(m for m in sys.modules if m.startswith("lightship")))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "lightship.serving.engine" not in run.stdout


# Off, on, auto.


def test_off_leaves_sglang_as_it_is(sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_MOE", "off")
    load_plugin(sglang)
    assert not sglang.registry.hooks
    assert type(layer_of(sglang).quant_method) is W4AFp8MoEMethod


@pytest.mark.parametrize("mode", ["on", "auto", ""])
def test_a_w4afp8_layer_is_taken(sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("LIGHTSHIP_MOE", mode)
    load_plugin(sglang)
    layer = layer_of(sglang)
    assert is_taken(layer)
    assert isinstance(layer.quant_method, W4AFp8MoEMethod)


@pytest.mark.parametrize("name", ["LIGHTSHIP_MOE", "LIGHTSHIP_MOE_ACTIVATIONS"])
def test_an_unknown_value_ends_the_server(
    sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(SystemExit, match=rf"{name}=yes: set it to one of"):
        load_plugin(sglang)


def test_another_sglang_ends_the_server_if_on(sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_MOE", "on")
    monkeypatch.delattr(sys.modules["sglang.srt.layers.quantization.w4afp8"], "W4AFp8Config")
    with pytest.raises(SystemExit, match=r"LIGHTSHIP_MOE=on, but this SGLang has no .*W4AFp8Config"):
        load_plugin(sglang)


def test_another_sglang_is_left_alone_if_auto(
    sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(sys.modules["sglang.srt.layers.quantization.w4afp8"], "W4AFp8Config")
    load_plugin(sglang)
    assert not sglang.registry.hooks
    assert "lightship leaves SGLang as it is" in caplog.text


def test_other_layers_keep_their_methods(plugin: types.SimpleNamespace) -> None:
    config = plugin.W4AFp8Config()
    assert type(config.get_quant_method(torch.nn.Linear(1, 1), prefix="model.layers.1.mlp.gate")) is Fp8LinearMethod
    assert config.get_quant_method(torch.nn.Identity(), "model.norm") is None


def ampere(_: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    return {}


def no_gpu(_: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return {}


def deepep(fake: types.SimpleNamespace, _: pytest.MonkeyPatch) -> dict[str, object]:
    fake.a2a = Backend.DEEPEP
    return {}


def eplb(fake: types.SimpleNamespace, _: pytest.MonkeyPatch) -> dict[str, object]:
    fake.moe.enable_eplb = True
    return {}


def redundant(fake: types.SimpleNamespace, _: pytest.MonkeyPatch) -> dict[str, object]:
    fake.moe.ep_num_redundant_experts = 8
    return {}


def layer_with(**arguments: object) -> Callable[..., dict[str, object]]:
    return lambda *_: arguments


OBSTACLES = [
    (ampere, r"need a Hopper GPU .* H100 80GB HBM3 \(8\.0\)"),
    (no_gpu, "need a Hopper GPU"),
    (deepep, "--moe-a2a-backend deepep"),
    (eplb, "enable_eplb"),
    (redundant, "ep_num_redundant_experts"),
    (layer_with(params_dtype=torch.float16), "bfloat16 activations, the model has torch.float16"),
    (layer_with(num_fused_shared_experts=1), "shared expert"),
    (layer_with(activation="gelu"), "activation is gelu"),
    (layer_with(swiglu_limit=7.0), "swiglu_limit is 7.0"),
    (layer_with(is_gated=False), "is_gated is False"),
    (layer_with(apply_router_weight_on_input=True), "router's weights"),
    (layer_with(no_combine=True), "router's weights"),
]


@pytest.mark.parametrize(("obstacle", "reason"), OBSTACLES)
def test_auto_leaves_what_it_cannot_run_and_says_why_once(
    sglang: types.SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    obstacle: Callable[..., dict[str, object]],
    reason: str,
) -> None:
    load_plugin(sglang)
    arguments = obstacle(sglang, monkeypatch)
    layers = [layer_of(sglang, **arguments) for _ in range(3)]
    assert {type(layer.quant_method) for layer in layers} == {W4AFp8MoEMethod}
    assert len(caplog.records) == 1
    assert re.search(reason, caplog.text)


@pytest.mark.parametrize(("obstacle", "reason"), OBSTACLES)
def test_on_refuses_what_it_cannot_run(
    plugin: types.SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    obstacle: Callable[..., dict[str, object]],
    reason: str,
) -> None:
    arguments = obstacle(plugin, monkeypatch)
    with pytest.raises(ServingError, match=rf"LIGHTSHIP_MOE=on, but lightship cannot run {PREFIX}: .*{reason}"):
        layer_of(plugin, **arguments)


# The load.


@pytest.mark.parametrize("mode", ["on", "auto"])
@pytest.mark.parametrize(
    ("sizes", "degrees"), [({"intermediate_size": 1408, "tp": (0, 2)}, "1"), ({"tp": (1, 8)}, "1, 2, 4")]
)
def test_shards_that_cut_through_groups_are_refused(
    sglang: types.SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    sizes: dict[str, object],
    degrees: str,
) -> None:
    monkeypatch.setenv("LIGHTSHIP_MOE", mode)
    load_plugin(sglang)
    with pytest.raises(ServingError, match=rf"multiples of 128, .*: {degrees}$"):
        layer_of(sglang, **sizes)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize(
    "missing",
    [
        "3.gate_proj.weight",
        "0.up_proj.weight",
        "7.down_proj.weight",
        "5.up_proj.weight_scale_inv",
        "2.w1.input_scale",
        "2.w3.input_scale",
        "6.w2.input_scale",
    ],
)
def test_a_missing_tensor_is_named(
    sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, missing: str, activations: str
) -> None:
    monkeypatch.setenv("LIGHTSHIP_MOE_ACTIVATIONS", activations)
    load_plugin(sglang)
    tensors = checkpoint()
    del tensors[f"{PREFIX}.{missing}"]
    with pytest.raises(CheckpointError, match=rf"lacks {PREFIX}\.{missing};"):
        load(layer_of(sglang), tensors)


def test_many_missing_tensors_are_counted(plugin: types.SimpleNamespace) -> None:
    tensors = {name: tensor for name, tensor in checkpoint().items() if "gate_proj" not in name}
    with pytest.raises(CheckpointError, match=r"0\.gate_proj\.weight, .* and 13 more of this layer"):
        load(layer_of(plugin), tensors)


def test_an_expert_of_another_rank_may_not_lack_its_input_scale_either(plugin: types.SimpleNamespace) -> None:
    tensors = checkpoint()
    del tensors[f"{PREFIX}.7.w2.input_scale"]
    with pytest.raises(CheckpointError, match=r"lacks .*7\.w2\.input_scale"):
        load(layer_of(plugin, ep=(0, 2)), tensors)


def test_under_expert_parallelism_a_rank_answers_for_its_own_weights(plugin: types.SimpleNamespace) -> None:
    broken, lacking = checkpoint(), checkpoint()
    broken[f"{PREFIX}.6.up_proj.weight_scale_inv"] = torch.zeros(INTERMEDIATE, HIDDEN // 128)
    del lacking[f"{PREFIX}.6.up_proj.weight"]
    for tensors in (broken, lacking):
        load(layer_of(plugin, ep=(0, 2)), tensors)
        with pytest.raises(CheckpointError, match=rf"{PREFIX}\.6\.up_proj\.weight"):
            load(layer_of(plugin, ep=(1, 2)), tensors)


def test_dynamic_activations_need_no_input_scales(plugin: types.SimpleNamespace) -> None:
    tensors = {name: tensor for name, tensor in checkpoint().items() if "input_scale" not in name}
    load(layer_of(plugin), tensors)


def test_static_activations_need_input_scales(sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_MOE_ACTIVATIONS", "static")
    load_plugin(sglang)
    tensors = {name: tensor for name, tensor in checkpoint().items() if "input_scale" not in name}
    with pytest.raises(CheckpointError, match=r"lacks .*0\.w1\.input_scale, .* and 21 more"):
        load(layer_of(sglang), tensors)


def test_a_loader_that_brings_nothing_is_named(plugin: types.SimpleNamespace) -> None:
    with pytest.raises(ServingError, match=rf"nothing was loaded for {PREFIX}.*LIGHTSHIP_MOE=off"):
        load(layer_of(plugin), {})


def fp8_blocks() -> Tensors:
    return {
        "1.up_proj.weight": torch.zeros(INTERMEDIATE, HIDDEN).to(torch.float8_e4m3fn),
        "1.up_proj.weight_scale_inv": torch.ones(INTERMEDIATE // 128, HIDDEN // 128),
    }


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        (
            "1.up_proj.weight",
            fp8_blocks()["1.up_proj.weight"],
            r"float8_e4m3fn \[512, 256\], expected int8 \[512, 128\]",
        ),
        (
            "1.up_proj.weight_scale_inv",
            fp8_blocks()["1.up_proj.weight_scale_inv"],
            r"float32 \[4, 2\], expected .*\[512, 2\]",
        ),
        ("2.down_proj.weight", torch.zeros(HIDDEN, INTERMEDIATE // 2).bfloat16(), "bfloat16 .*, expected int8"),
        ("2.down_proj.weight", torch.zeros(HIDDEN, INTERMEDIATE, dtype=torch.int8), r"expected int8 \[256, 256\]"),
        ("2.down_proj.weight_scale_inv", torch.ones(HIDDEN, 8).half(), "float16"),
        ("4.w1.input_scale", torch.ones(2), r"float32 \[2\], expected one floating-point number"),
        ("4.w1.input_scale", torch.tensor(1), r"int64 \[\], expected one floating-point number"),
        ("4.w2.input_scale", torch.tensor(0.0), r"is 0\.0, expected a positive number"),
        ("4.w2.input_scale", torch.tensor(float("nan")), "is nan, expected a positive number"),
        ("4.w3.input_scale", torch.tensor(0.5), r"is 0\.5 but that of w1 is 0\.01"),
        ("0.gate_proj.weight_scale_inv", torch.zeros(INTERMEDIATE, 2), "is zero throughout"),
        ("7.down_proj.weight_scale_inv", torch.full((HIDDEN, 4), float("inf")), "not finite"),
        ("3.up_proj.weight_scale_inv", torch.full((INTERMEDIATE, 2), float("nan")), "not finite"),
    ],
)
def test_a_broken_tensor_is_named(plugin: types.SimpleNamespace, name: str, tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(LightshipError, match=rf"^{PREFIX}\.{name} .*{says}"):
        load(layer_of(plugin), checkpoint() | {f"{PREFIX}.{name}": tensor})


def test_experts_in_one_tensor_are_refused(plugin: types.SimpleNamespace) -> None:
    layer = layer_of(plugin)
    with pytest.raises(CheckpointError, match="holds the experts of a layer in one tensor"):
        layer.w13_weight.weight_loader(layer.w13_weight, torch.zeros(1), "w13_weight", shard_id="w13", expert_id=0)


def test_the_mtp_layer_is_checked_like_others(plugin: types.SimpleNamespace) -> None:
    prefix = "model.decoder.mlp.experts"
    tensors = checkpoint(prefix)
    layer = layer_of(plugin, prefix=prefix)
    del tensors[f"{prefix}.3.w1.input_scale"]
    with pytest.raises(CheckpointError, match=r"lacks model\.decoder\.mlp\.experts\.3\.w1\.input_scale"):
        load(layer, tensors, prefix)


def test_sglangs_parameters_are_freed_and_cannot_be_loaded_again(plugin: types.SimpleNamespace) -> None:
    layer = layer_of(plugin)
    load(layer, checkpoint())
    assert [parameter.numel() for parameter in layer.parameters()] == [0] * 6
    with pytest.raises(ServingError, match=rf"{PREFIX} are packed .* LIGHTSHIP_MOE=off"):
        load(layer, checkpoint())


def test_processing_again_changes_nothing(plugin: types.SimpleNamespace) -> None:
    layer = layer_of(plugin)
    load(layer, checkpoint())
    experts = layer.quant_method.experts
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.experts is experts


# The numbers.


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eleven tokens, their experts' weights, their experts."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(11, HIDDEN, generator=generator).bfloat16()
    weights, ids = torch.rand(11, EXPERTS, generator=generator).topk(TOP)
    return x, weights, ids.int()


def run(
    fake: types.SimpleNamespace, tensors: Tensors, size: int, kind: str, factor: float | None = None
) -> torch.Tensor:
    """The layer's output: the sum over `size` ranks of kind `tp` or `ep`."""
    total = torch.zeros(11, HIDDEN)
    for rank in range(size):
        layer = layer_of(fake, routed_scaling_factor=factor, **{kind: (rank, size)})
        load(layer, tensors)
        total += layer(*inputs()).float()
    return total


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_tensor_and_expert_parallelism_agree(
    sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, activations: str, size: int
) -> None:
    monkeypatch.setenv("LIGHTSHIP_MOE_ACTIVATIONS", activations)
    load_plugin(sglang)
    whole = run(sglang, checkpoint(), 1, "tp")
    # Partial sums are rounded to bf16, and a dynamic scale belongs to the rank's part of the intermediate.
    for kind in ("tp", "ep"):
        difference = (run(sglang, checkpoint(), size, kind) - whole).norm() / whole.norm()
        assert difference < (0.005 if activations == "static" or kind == "ep" else 0.03)
    assert whole.norm() / whole.numel() ** 0.5 > 0.1


def test_static_scales_are_the_layers_on_every_rank(
    sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LIGHTSHIP_MOE_ACTIVATIONS", "static")
    load_plugin(sglang)
    tensors = checkpoint()
    for name in ("w1", "w3"):
        tensors[f"{PREFIX}.6.{name}.input_scale"] = torch.tensor(0.04)
    found = set()
    for parallel in ({"ep": (0, 2)}, {"ep": (1, 2)}, {"tp": (0, 2)}):
        layer = layer_of(sglang, **parallel)
        load(layer, tensors)
        experts = layer.quant_method.experts.tensors
        found.add((round(experts["w13_input_scale"].item(), 4), round(experts["w2_input_scale"].item(), 4)))
    assert found == {(0.04, 0.02)}
    assert "w1 and w3 input scales differ between experts, from 0.01" in caplog.text


def test_the_checkpoint_reaches_the_kernels_unchanged(plugin: types.SimpleNamespace) -> None:
    layer = layer_of(plugin)
    tensors = checkpoint()
    load(layer, tensors)
    experts = layer.quant_method.experts
    assert isinstance(experts, ReferenceExperts)
    gate, up, down = (tensors[f"{PREFIX}.5.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj"))
    assert experts.tensors["w13"][5].equal(torch.cat([gate, up]))
    assert experts.tensors["w2"][5].equal(down)
    assert experts.tensors["w2_scale"][5].equal(tensors[f"{PREFIX}.5.down_proj.weight_scale_inv"])
    x, weights, ids = inputs()
    reference = W4AFP8Experts(experts.tensors, TensorParallel(), torch.float32, "dynamic")
    assert layer(x, weights, ids).equal(reference(x, ids.long(), weights))


@pytest.mark.parametrize("parallel", [{"tp": (1, 2)}, {"ep": (1, 2)}])
def test_the_kernels_learn_the_models_experts_and_how_many_a_token_chooses(
    plugin: types.SimpleNamespace, parallel: dict[str, object]
) -> None:
    layer = layer_of(plugin, top_k=TOP, **parallel)
    load(layer, checkpoint())
    experts = layer.quant_method.experts
    assert (experts.top_k, experts.total_experts) == (TOP, EXPERTS)


@pytest.mark.parametrize("factor", [2.5, 1.0, None])
def test_the_routed_scaling_factor_is_applied_once(plugin: types.SimpleNamespace, factor: float | None) -> None:
    scaled, plain = run(plugin, checkpoint(), 1, "tp", factor), run(plugin, checkpoint(), 1, "tp")
    torch.testing.assert_close(scaled, plain * (factor or 1.0), rtol=0.01, atol=0.01)


# What it says.


def test_it_says_once_that_it_runs_the_model(plugin: types.SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    layers = [layer_of(plugin) for _ in range(3)]
    for layer in layers:
        load(layer, checkpoint())
    [line] = [r.getMessage() for r in caplog.records if "runs the W4AFP8 experts" in r.getMessage()]
    assert line.endswith("of 3 layers: activations dynamic, tuning reference")
    load(layer_of(plugin), checkpoint())  # the draft model, loaded after the model itself
    assert "of 4 layers" in caplog.text


def test_other_ranks_are_silent(plugin: types.SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load(layer_of(plugin, tp=(1, 2)), checkpoint())
    assert "runs the W4AFP8 experts" not in caplog.text


def test_server_info_shows_it(plugin: types.SimpleNamespace) -> None:
    load(layer_of(plugin), checkpoint())
    state = plugin.Scheduler().get_internal_state(None).internal_state
    assert state["tp_size"] == 1
    assert state["lightship_moe"]["layers"] == 1
    assert state["lightship_moe"]["activations"] == "dynamic"
    assert state["lightship_moe"]["left"] == []


def test_server_info_shows_what_was_left(sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugin(sglang)
    layer_of(sglang, **ampere(sglang, monkeypatch))
    state = sglang.Scheduler().get_internal_state(None).internal_state["lightship_moe"]
    assert state["layers"] == 0
    assert "Hopper" in state["left"][0]


def test_processes_without_a_scheduler_load_none(
    sglang: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "sglang.srt.managers.scheduler")
    load_plugin(sglang)
    assert len(sglang.registry.hooks) == 1


def test_the_gauge_is_in_sglangs_metrics(tmp_path: Path) -> None:
    code = """
from lightship.serving.sglang_plugin import activity
from lightship.serving.sglang_plugin.settings import Settings
for _ in range(2):
    activity.create()
for _ in range(2):
    activity.serve(Settings("on", "static"), "h100", first_rank=True)
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert 'lightship_moe_active{activations="static",tuning="h100",version="0.1.0"} 2.0' in run.stdout
