"""The routed experts of one layer at work: read ahead, rounded, written behind, journaled, replayed.

An expert's rounding depends on the source, the recipe and what reaches the layer, on nothing else; so experts can be
rounded in any order, by any process that sees the work directory, and an interrupted layer goes on with those that are
left. The replay then goes through all of them in order, rounded now or before, and gives the same sums either way.

Shape suffixes: T tokens of the layer, t of one expert, K experts a token, H hidden size, I intermediate size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lightship.checkpoint import Checkpoint, TensorReader
from lightship.errors import CheckpointError
from lightship.quant.blocks import MoEInputs
from lightship.quant.expert import (
    CHUNK,
    PRIOR_TOKENS,
    ExpertRounder,
    ExpertWeights,
    RoundActivations,
    RoundedExpert,
    intermediate,
    output,
    packed,
    round_tokens_through_fp8,
)
from lightship.quant.journal import Journal
from lightship.quant.layout import Shards
from lightship.quant.magnitudes import Magnitudes, choose_input_scale
from lightship.quant.pipeline import Writer, read_ahead
from lightship.quant.rounding import Int4Weight
from lightship.recipe import Quantization
from lightship.records import ExpertRounding, InputScale
from lightship.w4afp8 import dequantize_fp8_blocks, round_groups_through_fp8, unpack_int4

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Raw = dict[str, torch.Tensor]
"""A projection's tensors by the end of their names: `gate_proj.weight`, `gate_proj.weight_scale_inv`, …"""


@dataclass(frozen=True)
class Replayed:
    """The experts' sum [T, H] float32, and the scale of what entered w2."""

    routed_TH: torch.Tensor
    w2_input: InputScale


class LayerExperts:
    """The experts of the layer `name` (`model.layers.3.mlp`), given what reaches them."""

    def __init__(
        self,
        name: str,
        number: int,
        source: TensorReader,
        shards: Shards,
        journal: Journal,
        settings: Quantization,
        inputs: MoEInputs,
        device: torch.device,
    ) -> None:
        self.name = name
        self._source = source
        self._shards = shards
        self._journal = journal
        self._device = device
        self._inputs = inputs
        self._records: dict[int, ExpertRounding] = {}
        self._count = source.checkpoint.dimensions.n_routed_experts
        every = max(1, len(inputs.x_TH) // PRIOR_TOKENS)
        prior_TH = inputs.x_TH[::every][:PRIOR_TOKENS].to(device)
        self._rounder = ExpertRounder(settings, number, prior_TH)
        order_P = inputs.experts_TK.flatten().argsort(stable=True)
        counts = inputs.experts_TK.flatten().bincount(minlength=self._count)
        self._pairs = order_P.split(counts.tolist())
        self._fp8 = _is_fp8(source.checkpoint, name)

    def unit(self, expert: int) -> str:
        """The expert's name in the journal."""
        return f"{self.name}.experts.{expert}"

    @property
    def left(self) -> list[int]:
        """Experts that are not rounded yet."""
        return [e for e in range(self._count) if self.unit(e) not in self._journal.done]

    def records(self) -> list[ExpertRounding]:
        """How each expert was rounded, here, before or elsewhere; all must be."""
        return [self._records.get(e) or self._journal.record(self.unit(e), ExpertRounding) for e in range(self._count)]

    def tokens_by_scene(self, scenes: dict[str, int]) -> dict[str, list[int]]:
        """Tokens that reached each expert; `scenes` holds how many tokens of the layer are of each, in order."""
        parts = self._inputs.experts_TK.split(list(scenes.values()))
        return {
            s: part.flatten().bincount(minlength=self._count).tolist() for s, part in zip(scenes, parts, strict=True)
        }

    def round(self, experts: Sequence[int], writer: Writer, on_done: Callable[[], object]) -> None:
        """Round these experts and hand them to the writer."""
        for expert, raw in read_ahead(self._read_source, experts):
            self._round(expert, self._weights(expert, raw), *self._tokens_of(expert)[1:], writer)
            on_done()

    def replay(self, writer: Writer, quantized: bool, on_done: Callable[[], object]) -> Replayed:
        """Send every token through its experts, rounding those that are left on the way.

        Args:
            quantized: replay with the rounded weights, as the result will be served; else with the source's.
        """
        left = set(self.left)
        routed_TH = torch.zeros(self._inputs.x_TH.shape, device=self._inputs.x_TH.device)
        seen = Magnitudes(self._device)
        round_activations: RoundActivations = round_tokens_through_fp8
        if not quantized:
            round_activations = round_groups_through_fp8 if self._fp8 else _unchanged
        read = partial(self._read, left=left, source_too=not quantized)
        for expert, (raw, result) in read_ahead(read, range(self._count)):
            weights = self._weights(expert, raw) if raw else None
            tokens_t, x_tH, router_weights_t = self._tokens_of(expert)
            if expert in left:
                assert weights
                rounded = self._round(expert, weights, x_tH, router_weights_t, writer)
                on_done()
            else:
                rounded = self._rounded(result)
            dtype = self._inputs.x_TH.dtype
            used = rounded.weights(dtype) if quantized else weights
            assert used
            h_tI = intermediate(used, x_tH, round_activations)
            seen.add(h_tI)
            y_tH = output(used, h_tI, round_activations).float() * router_weights_t.float()[:, None]
            routed_TH.index_add_(0, tokens_t, y_tH.to(routed_TH.device))
        return Replayed(routed_TH, self._scale(seen, "w2"))

    def w13_input(self) -> InputScale:
        """The scale of what enters w1 and w3."""
        seen = Magnitudes(self._device)
        for chunk in self._inputs.x_TH.split(CHUNK):
            seen.add(chunk.to(self._device))
        return self._scale(seen, "w1 and w3")

    def input_scale_tensors(self, w13: InputScale, w2: InputScale) -> list[tuple[str, torch.Tensor]]:
        """Every expert's input scales, by the names that SGLang knows."""
        values = {"w1": w13.scale, "w2": w2.scale, "w3": w13.scale}
        return [
            (f"{self.unit(e)}.{w}.input_scale", torch.tensor(value, dtype=torch.bfloat16))
            for e in range(self._count)
            for w, value in values.items()
        ]

    def _scale(self, seen: Magnitudes, of: str) -> InputScale:
        if not seen.finite:
            raise CheckpointError(
                f"{self._source.checkpoint.path}: the inputs of {of} in {self.name} are NaN or infinite on the "
                "calibration text; verify the download"
            )
        return choose_input_scale(seen)

    def _tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens [t], x_tH on the device, router weights [t] on the device) of an expert."""
        pairs_t = self._pairs[expert]
        tokens_t = pairs_t // self._inputs.experts_TK.shape[1]
        router_weights_t = self._inputs.weights_TK.flatten()[pairs_t]
        return tokens_t, self._inputs.x_TH[tokens_t].to(self._device), router_weights_t.to(self._device)

    def _round(
        self,
        expert: int,
        weights: ExpertWeights,
        x_tH: torch.Tensor,
        router_weights_t: torch.Tensor,
        writer: Writer,
    ) -> RoundedExpert:
        rounded, record = self._rounder.round(expert, weights, x_tH, router_weights_t)
        self._records[expert] = record
        writer.put(self.unit(expert), self._tensors(expert, rounded), record)
        return rounded

    def _tensors(self, expert: int, rounded: RoundedExpert) -> Iterable[tuple[str, torch.Tensor]]:
        w13, w13_scale = packed(rounded.w13)
        w2, w2_scale = packed(rounded.w2)
        parts = (*zip(w13.chunk(2), w13_scale.chunk(2), strict=True), (w2, w2_scale))
        for projection, (weight, scale) in zip(PROJECTIONS, parts, strict=True):
            yield f"{self.unit(expert)}.{projection}.weight", weight
            yield f"{self.unit(expert)}.{projection}.weight_scale_inv", scale

    def _read(self, expert: int, *, left: set[int], source_too: bool) -> tuple[Raw | None, Raw]:
        raw = self._read_source(expert) if source_too or expert in left else None
        return raw, {} if expert in left else self._read_result(expert)

    def _read_source(self, expert: int) -> Raw:
        pinned = self._device.type == "cuda"
        stem = f"{self.unit(expert)}."
        names = expert_tensors(self._source.checkpoint, self.name, expert)
        return {name.removeprefix(stem): self._source.read(name, pinned=pinned) for name in names}

    def _read_result(self, expert: int) -> Raw:
        parts = ("weight", "weight_scale_inv")
        return {
            f"{p}.{part}": self._shards.read(f"{self.unit(expert)}.{p}.{part}") for p in PROJECTIONS for part in parts
        }

    def _weights(self, expert: int, raw: Raw) -> ExpertWeights:
        """Float weights on the device, checked.

        Raises:
            CheckpointError: names the tensor that holds NaN or infinity.
        """
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in raw.items()}
        for name, tensor in moved.items():
            if not tensor.float().isfinite().all():
                self._source.read_finite(f"{self.unit(expert)}.{name}")

        def weight(projection: str) -> torch.Tensor:
            stored = moved[f"{projection}.weight"]
            if not self._fp8:
                return stored.float()
            return dequantize_fp8_blocks(stored, moved[f"{projection}.weight_scale_inv"])

        return ExpertWeights(torch.cat([weight("gate_proj"), weight("up_proj")]), weight("down_proj"))

    def _rounded(self, raw: Raw) -> RoundedExpert:
        def joined(part: str, *projections: str) -> torch.Tensor:
            return torch.cat([raw[f"{p}.{part}"] for p in projections]).to(self._device)

        w13, w2 = ("gate_proj", "up_proj"), ("down_proj",)
        return RoundedExpert(
            Int4Weight(unpack_int4(joined("weight", *w13)), joined("weight_scale_inv", *w13)),
            Int4Weight(unpack_int4(joined("weight", *w2)), joined("weight_scale_inv", *w2)),
        )


def expert_tensors(checkpoint: Checkpoint, name: str, expert: int) -> list[str]:
    """Names of the tensors that hold an expert of the layer `name` in a source."""
    parts = ("weight", "weight_scale_inv") if _is_fp8(checkpoint, name) else ("weight",)
    return [f"{name}.experts.{expert}.{projection}.{part}" for projection in PROJECTIONS for part in parts]


def _is_fp8(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.info(f"{name}.experts.0.gate_proj.weight").dtype == "F8_E4M3"


def _unchanged(x_TI: torch.Tensor) -> torch.Tensor:
    return x_TI
