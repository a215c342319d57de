"""The parts of SGLang that the plugin touches, with the signatures of 0.5.17 and 0.5.23, small enough to read.

docs/sglang.md lists the signatures that were read from the real sources. The layer shards as SGLang's does: gate and up
by outputs, down by inputs, experts by blocks; a loader goes through all experts on every rank.
"""

import enum
import functools
import logging
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from lightship.experts import TensorParallel, W4AFP8Experts

VERSIONS = ("0.5.17", "0.5.23")
logger = logging.getLogger("sglang")


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    """Registers hooks and applies them; what fails is logged, and the server goes on."""

    def __init__(self) -> None:
        self.hooks: dict[str, tuple[HookType, Callable[..., Any]]] = {}

    def register(
        self, target: str, hook: Callable[..., Any], hook_type: HookType = HookType.AFTER, *, source: Any = None
    ) -> None:
        del source
        self.hooks[target] = (hook_type, hook)

    def apply_hooks(self) -> None:
        for target, (kind, hook) in self.hooks.items():
            try:
                owner, name = target.rsplit(".", 1)
                parent = pkgutil.resolve_name(owner)
                setattr(parent, name, _wrapped(getattr(parent, name), kind, hook))
            except Exception:
                logger.exception("Failed to apply hooks to %s", target)


def _wrapped(original: Callable[..., Any], kind: HookType, hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def around(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    @functools.wraps(original)
    def after(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed

    return {HookType.AROUND: around, HookType.AFTER: after}[kind]


class StandardTopKOutput(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor | None


class StandardDispatchOutput(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_output: StandardTopKOutput
    hidden_states_pre_quant: tuple[torch.Tensor, torch.Tensor] | None = None


class StandardCombineInput(NamedTuple):
    hidden_states: torch.Tensor


class Backend(enum.Enum):
    NONE = "none"
    DEEPEP = "deepep"

    def is_none(self) -> bool:
        return self is Backend.NONE


class Scheduler:
    def get_internal_state(self, recv_req: Any) -> Any:
        del recv_req
        return types.SimpleNamespace(internal_state={"tp_size": 1})


class Fp8LinearMethod:
    """What W4AFp8Config gives every linear layer."""


class W4AFp8MoEMethod:
    """SGLang's parameters, their start values, and what it does to them after the load."""

    runner = None

    def __init__(self, quant_config: Any) -> None:
        self.quant_config = quant_config

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        del params_dtype
        e, h, i = num_experts, hidden_size, intermediate_size_per_partition
        for name, start in (
            ("w13_weight", torch.empty(e, 2 * i, h // 2, dtype=torch.int8)),
            ("w2_weight", torch.empty(e, h, i // 2, dtype=torch.int8)),
            ("w13_weight_scale_inv", torch.zeros(e, 2 * i, h // 128)),
            ("w2_weight_scale_inv", torch.zeros(e, h, i // 128)),
            ("w13_input_scale", torch.ones(e, 2, dtype=torch.bfloat16)),
            ("w2_input_scale", torch.ones(e, dtype=torch.bfloat16)),
        ):
            parameter = torch.nn.Parameter(start, requires_grad=False)
            parameter.weight_loader = extra_weight_attrs["weight_loader"]  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.processed_by_stock = True

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        del layer
        self.moe_runner_config = moe_runner_config

    def get_moe_runner_backend(self, layer: torch.nn.Module) -> Any:
        del layer
        return self.runner

    def apply(self, layer: Any, dispatch_output: Any) -> StandardCombineInput:
        raise NotImplementedError("SGLang's kernels need a GPU")


class W4AFp8Config:
    def get_name(self) -> str:
        return "w4afp8"

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        del prefix
        if isinstance(layer, FusedMoE):
            return W4AFp8MoEMethod(self)
        return Fp8LinearMethod() if isinstance(layer, torch.nn.Linear) else None


@dataclass
class MoeRunnerConfig:
    activation: str = "silu"
    is_gated: bool = True
    apply_router_weight_on_input: bool = False
    no_combine: bool = False
    routed_scaling_factor: float | None = None
    gemm1_alpha: float | None = None
    gemm1_clamp_limit: float | None = None
    swiglu_limit: float | None = None


class FusedMoE(torch.nn.Module):
    """One layer on one rank."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        version: str,
        prefix: str = "model.layers.1.mlp.experts",
        tp: tuple[int, int] = (0, 1),
        ep: tuple[int, int] = (0, 1),
        top_k: int | None = None,
        num_fused_shared_experts: int = 0,
        params_dtype: torch.dtype = torch.bfloat16,
        quant_config: Any = None,
        **runner: Any,
    ) -> None:
        super().__init__()
        self.params_dtype = params_dtype
        self.top_k = top_k
        self.num_experts = num_experts
        self.num_fused_shared_experts = num_fused_shared_experts
        (self.moe_tp_rank, self.moe_tp_size), (self.moe_ep_rank, self.moe_ep_size) = tp, ep
        self.num_local_experts = num_experts // self.moe_ep_size
        self.moe_runner_config = MoeRunnerConfig(**runner)
        self.quant_method = (quant_config or W4AFp8Config()).get_quant_method(self, prefix)
        self.quant_method.create_weights(
            layer=self,
            num_experts=self.num_local_experts,
            hidden_size=hidden_size,
            intermediate_size_per_partition=intermediate_size // self.moe_tp_size,
            params_dtype=params_dtype,
            weight_loader=self.weight_loader,
            with_bias=False,
            moe_intermediate_size=intermediate_size,
        )
        self.quant_method.create_moe_runner(self, self.moe_runner_config)
        if version == "0.5.23":
            assert self.quant_method.get_moe_runner_backend(self) is None
            assert self.quant_method.runner is None

    def weight_loader(
        self, param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int
    ) -> None:
        local = expert_id - self.moe_ep_rank * self.num_local_experts
        if not 0 <= local < self.num_local_experts:
            return
        mine = param.data[local]
        if "input_scale" in weight_name:
            mine.fill_(loaded_weight.item())
            return
        dimension = 1 if shard_id == "w2" else 0
        part = loaded_weight.chunk(self.moe_tp_size, dim=dimension)[self.moe_tp_rank]
        if shard_id != "w2":
            mine = mine.chunk(2)[0 if shard_id == "w1" else 1]
        mine.copy_(part)

    def forward(self, hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        first = self.moe_ep_rank * self.num_local_experts
        local = torch.where((ids >= first) & (ids < first + self.num_local_experts), ids - first, -1)
        output = StandardTopKOutput(weights, local.int(), None)
        return self.quant_method.apply(self, StandardDispatchOutput(hidden_states, None, output)).hidden_states


def load(layer: FusedMoE, tensors: dict[str, torch.Tensor], prefix: str = "model.layers.1.mlp.experts") -> None:
    """Read a checkpoint as SGLang's DeepSeek loader does, name by name, and process the layer."""
    parameters = {f"{prefix}.{name}": parameter for name, parameter in layer.named_parameters()}
    shards = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "w1": "w1", "w2": "w2", "w3": "w3"}
    for name, tensor in tensors.items():
        expert, projection, kind = name.removeprefix(f"{prefix}.").split(".")
        shard = shards[projection]
        parameter = f"{prefix}.{'w2' if shard == 'w2' else 'w13'}_{kind}"
        if parameter in parameters:
            loader = parameters[parameter].weight_loader
            loader(parameters[parameter], tensor, parameter, shard_id=shard, expert_id=int(expert))
    layer.quant_method.process_weights_after_loading(layer)


class ReferenceExperts:
    """In place of the kernels: the CPU reference, with their interface."""

    tuning = "reference"

    def __init__(
        self,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        w13_input_scale: torch.Tensor,
        w2_input_scale: torch.Tensor,
        *,
        activations: Any,
        top_k: int,
        total_experts: int,
        scale: float,
    ) -> None:
        assert (w13_scale.dtype, w2_scale.dtype) == (torch.bfloat16, torch.bfloat16)
        assert (w13_input_scale.dtype, w13_input_scale.shape) == (torch.float32, ())
        names = ("w13", "w13_scale", "w2", "w2_scale", "w13_input_scale", "w2_input_scale")
        tensors = dict(zip(names, (w13, w13_scale, w2, w2_scale, w13_input_scale, w2_input_scale), strict=True))
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self.activations, self.top_k, self.total_experts, self.scale = activations, top_k, total_experts, scale
        self._reference = W4AFP8Experts(self.tensors, TensorParallel(), torch.float32, activations)

    def __call__(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        assert (experts_TK.dtype, weights_TK.dtype) == (torch.int32, torch.float32)
        here = experts_TK >= 0
        return self._reference(x_TH, experts_TK.clamp(min=0).long(), weights_TK * here * self.scale)


@pytest.fixture(params=VERSIONS)
def sglang(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A fake SGLang on a fake Hopper GPU: `version`, `registry`, and switches that a test may turn."""
    from lightship.serving.sglang_plugin import activity, method

    fake = types.SimpleNamespace(version=request.param, registry=HookRegistry(), a2a=Backend.NONE)
    fake.moe = types.SimpleNamespace(enable_eplb=False, ep_num_redundant_experts=0)
    if fake.version == "0.5.23":
        fake.moe.enable_paged_experts = False
    # Hooks change classes: each test has its own.
    fake.Scheduler = type("Scheduler", (Scheduler,), {})
    fake.W4AFp8Config = type("W4AFp8Config", (W4AFp8Config,), {})
    modules: dict[str, dict[str, Any]] = {
        "plugins.hook_registry": {"HookRegistry": fake.registry, "HookType": HookType},
        "layers.quantization.w4afp8": {"W4AFp8Config": fake.W4AFp8Config, "W4AFp8MoEMethod": W4AFp8MoEMethod},
        "layers.moe.token_dispatcher": {"StandardCombineInput": StandardCombineInput},
        "layers.moe.utils": {"get_moe_a2a_backend": lambda: fake.a2a},
        "runtime_context": {"get_exec": lambda: types.SimpleNamespace(moe=fake.moe)},
        "managers.scheduler": {"Scheduler": fake.Scheduler},
    }
    for name, content in modules.items():
        _install(monkeypatch, f"sglang.srt.{name}", content)
    _install(monkeypatch, "lightship.serving.moe.layer", {"FusedExperts": ReferenceExperts})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(activity, "_activity", activity.Activity())
    for name in ("LIGHTSHIP_MOE", "LIGHTSHIP_MOE_ACTIVATIONS", "PROMETHEUS_MULTIPROC_DIR"):
        monkeypatch.delenv(name, raising=False)
    method.method_class.cache_clear()
    yield fake
    method.method_class.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, name: str, content: dict[str, Any]) -> None:
    """A module and its parents in sys.modules, each an attribute of the one above."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
            sys.modules[path].__path__ = []  # type: ignore[attr-defined]
        if end > 1:
            monkeypatch.setattr(
                sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[path], raising=False
            )
    for key, value in content.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def load_plugin(fake: types.SimpleNamespace) -> None:
    """As SGLang does: run the entry point, log what it raises, apply the hooks."""
    from lightship.serving.sglang_plugin.entry import activate

    try:
        activate()
    except Exception:
        logger.exception("Failed to execute general plugin: lightship")
    fake.registry.apply_hooks()
