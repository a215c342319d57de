"""What SGLang's loader brings for one layer's experts, tensor by tensor, and whether it is what W4AFP8 needs.

SGLang starts its parameters at zero, one or whatever was in memory, and forgets which it has filled: a checkpoint that
lacks a tensor is served, and talks nonsense. Here every tensor is checked as it comes, and afterwards none may be
missing. Every rank's loader goes through all experts, also those of other ranks; so the input scales of the whole layer
are known everywhere, and tensor and expert parallelism give the same.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lightship.errors import CheckpointError, ServingError
from lightship.w4afp8 import GROUP, tensor_parallel_degrees

PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
KINDS = ("weight", "weight_scale_inv", "input_scale")
INPUT_SCALE_TOLERANCE = 1e-5
"""How far w1's and w3's input scales may differ; SGLang's own figure."""
NAMED = 3
"""Missing tensors that an error names before it only counts."""

logger = logging.getLogger(__name__)

Load = Callable[..., None]


@dataclass
class Arrivals:
    """One layer's experts.

    prefix: as SGLang calls the layer, `model.layers.3.mlp.experts`; `model.decoder` is the MTP layer.
    experts: routed experts of the layer, on all ranks.
    own: those whose weights this rank keeps.
    hidden, intermediate: sizes of the whole, unsharded layer.
    """

    prefix: str
    experts: int
    own: range
    hidden: int
    intermediate: int
    input_scales: dict[tuple[int, str], float] = field(default_factory=dict)
    _seen: set[tuple[str, str, int]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def watching(self, load: Load) -> Load:
        """`load`, FusedMoE's own weight loader, with each tensor looked at before it is loaded.

        SGLang calls it from several threads; what it raises ends the load.
        """

        def watched(
            param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int | None
        ) -> None:
            if expert_id is None or shard_id not in PROJECTIONS:
                raise CheckpointError(
                    f"{weight_name} holds the experts of a layer in one tensor: W4AFP8 stores each expert's projections"
                    " apart; see `lightship verify`"
                )
            self.receive(loaded_weight, kind_of(weight_name), shard_id, expert_id)
            load(param, loaded_weight, weight_name, shard_id=shard_id, expert_id=expert_id)

        return watched

    def receive(self, tensor: torch.Tensor, kind: str, shard: str, expert: int) -> None:
        """Check one whole, unsharded tensor and note it.

        Raises:
            CheckpointError: wrong dtype or shape; an input scale that is no positive number, or w1's is not w3's.
        """
        name = self.name(kind, shard, expert)
        if kind == "input_scale":
            self._receive_input_scale(tensor, name, shard, expert)
        else:
            self._check_layout(tensor, kind, name, shard)
        with self._lock:
            self._seen.add((kind, shard, expert))

    def name(self, kind: str, shard: str, expert: int) -> str:
        """The checkpoint's name of a tensor; input scales have names of their own."""
        part = shard if kind == "input_scale" else PROJECTIONS[shard]
        return f"{self.prefix}.{expert}.{part}.{kind}"

    def check_complete(self, *, static: bool) -> None:
        """After loading: nothing is missing.

        Input scales may be missing altogether, for nobody needs them, unless the activations are static.

        Raises:
            CheckpointError: names the first tensors that are missing.
        """
        if not self._seen:
            raise ServingError(
                f"nothing was loaded for {self.prefix}, or by a loader that lightship cannot watch (--load-format dummy"
                " and sharded_state are such); set LIGHTSHIP_MOE=off for it"
            )
        wanted = [(kind, shard, e) for e in self.own for shard in PROJECTIONS for kind in KINDS[:2]]
        if static or self.input_scales:
            wanted += [("input_scale", shard, e) for e in range(self.experts) for shard in PROJECTIONS]
        missing = [self.name(*key) for key in wanted if key not in self._seen]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(missing[:NAMED])}"
                + (f" and {len(missing) - NAMED} more of this layer" if len(missing) > NAMED else "")
                + "; find out more by `lightship verify`, and write it again by `lightship quantize`"
            )

    def input_scale(self, *shards: str) -> float:
        """The largest input scale over the layer's experts, all of them, of w1 and w3 or of w2."""
        found = {self.input_scales[e, shard] for e in range(self.experts) for shard in shards}
        if len(found) > 1:
            logger.warning(
                "%s: %s input scales differ between experts, from %g to %g; the largest is used on every rank, where "
                "SGLang itself would differ between tensor and expert parallelism",
                self.prefix,
                " and ".join(shards),
                min(found),
                max(found),
            )
        return max(found)

    def _receive_input_scale(self, tensor: torch.Tensor, name: str, shard: str, expert: int) -> None:
        if tensor.numel() != 1 or not tensor.is_floating_point():
            raise CheckpointError(f"{name} is {_described(tensor)}, expected one floating-point number")
        scale = tensor.float().item()
        if not 0 < scale < float("inf"):
            raise CheckpointError(f"{name} is {scale}, expected a positive number: calibrate and write it again")
        with self._lock:
            self.input_scales[expert, shard] = scale
            other = {"w1": "w3", "w3": "w1"}.get(shard)
            theirs = self.input_scales.get((expert, other), scale) if other else scale
        if abs(scale - theirs) > INPUT_SCALE_TOLERANCE:
            raise CheckpointError(
                f"{name} is {scale:g} but that of {other} is {theirs:g}: both see the same input and must be the same"
            )

    def _check_layout(self, tensor: torch.Tensor, kind: str, name: str, shard: str) -> None:
        outputs, inputs = (self.hidden, self.intermediate) if shard == "w2" else (self.intermediate, self.hidden)
        is_weight = kind == "weight"
        shape = (outputs, inputs // 2 if is_weight else inputs // GROUP)
        right_type = tensor.dtype == torch.int8 if is_weight else tensor.dtype in (torch.bfloat16, torch.float32)
        if tuple(tensor.shape) != shape or not right_type:
            types = "int8" if is_weight else "bfloat16 or float32"
            raise CheckpointError(
                f"{name} is {_described(tensor)}, expected {types} {list(shape)}: two int4 a byte, one scale for "
                f"{GROUP} inputs"
            )


def kind_of(parameter: str) -> str:
    """`weight`, `weight_scale_inv` or `input_scale`, from SGLang's name of a parameter."""
    return next((kind for kind in KINDS[1:] if parameter.endswith(kind)), KINDS[0])


def check_shard(prefix: str, hidden: int, shard: int, tp: int) -> None:
    """Before loading: each rank's part of the experts is whole groups; SGLang would cut through them, and not say so.

    Raises:
        ServingError: it is not; names the degrees that work.
    """
    if shard % GROUP or hidden % GROUP:
        degrees = ", ".join(map(str, tensor_parallel_degrees(shard * tp))) or "none"
        raise ServingError(
            f"{prefix} cannot be cut into {tp} parts: hidden size {hidden} and each part's {shard} must be multiples "
            f"of {GROUP}, the quantization group; degrees for moe_intermediate_size {shard * tp}: {degrees}"
        )


def check_scales(arrivals: Arrivals, scale_EOG: torch.Tensor, shards: tuple[str, ...]) -> None:
    """After loading: the group scales of this rank's shard, [E, O, G] with `shards` one above the other, are usable.

    Raises:
        CheckpointError: a weight's scales are all zero, or one is not finite.
    """
    for part, shard in zip(scale_EOG.chunk(len(shards), dim=1), shards, strict=True):
        finite_E = part.isfinite().flatten(1).all(dim=1)
        alive_E = (part != 0).flatten(1).any(dim=1)
        for good_E, what in ((finite_E, "holds values that are not finite"), (alive_E, "is zero throughout")):
            if not good_E.all():
                expert = arrivals.own[int(good_E.logical_not().nonzero()[0])]
                raise CheckpointError(
                    f"{arrivals.name('weight_scale_inv', shard, expert)} {what}: quantize and write it again"
                )


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
