"""Weights in another's place: another expert's, or up where gate belongs. Shape and histogram are right, so that only
the source can tell, by the error against each weight of the layer that could be there.
"""

import torch

from lightship.checkpoint import TensorReader
from lightship.quant.mispacking import relative_error
from lightship.quant.source_weights import read_source_weight
from lightship.w4afp8 import GROUP, dequantize_int4

ALIKE = {"gate_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj", "gate_proj"), "down_proj": ("down_proj",)}
"""Projection -> those of the same shape."""


class Owners:
    """Finds whose weight of the source a misplaced one is.

    Of the layer in question the first 128 rows and inputs of every weight are held, 50 MB for 256 experts; the weight
    that is nearest there is then compared in full.
    """

    def __init__(self, source: TensorReader, limit: float) -> None:
        self.limit = limit
        self._source = source
        self._layer = ""
        self._corners: dict[str, tuple[list[str], torch.Tensor]] = {}

    def explain(self, layer: str, name: str, packed: torch.Tensor, scale_OG: torch.Tensor) -> str | None:
        """Say whose weight it is, if it is one of the source's in this layer to within the limit.

        Args:
            packed: int8 [out, in / 2] as SGLang packs it.
        """
        if layer != self._layer:
            self._layer, self._corners = layer, {}
        corner_OI = dequantize_int4(packed[:GROUP, : GROUP // 2], scale_OG[:GROUP, :1])
        stem, projection, _ = name.rsplit(".", 2)
        _, nearest = min(self._nearest(layer, alike, corner_OI) for alike in ALIKE[projection])
        if nearest == name:
            return None
        restored_OI = dequantize_int4(packed, scale_OG)
        if not relative_error(read_source_weight(self._source, nearest), restored_OI) <= self.limit:
            return None
        owner, other, _ = nearest.rsplit(".", 2)
        if owner == stem:
            return f"it is the source's {other}: gate and up are exchanged"
        return f"it is {other} of the source's expert {owner.rsplit('.', 1)[1]}: experts have changed places"

    def _nearest(self, layer: str, projection: str, corner_OI: torch.Tensor) -> tuple[float, str]:
        """Error and name of the weight of this projection, of any expert, whose corner is nearest."""
        if projection not in self._corners:
            count = self._source.checkpoint.dimensions.n_routed_experts
            names = [f"{layer}.experts.{expert}.{projection}.weight" for expert in range(count)]
            rows = slice(0, GROUP)
            corners = torch.stack([read_source_weight(self._source, name, rows)[:, :GROUP] for name in names])
            self._corners[projection] = names, corners
        names, corners_EOI = self._corners[projection]
        energy_E = corners_EOI.square().sum(dim=(1, 2)).clamp_min(1e-30)
        errors_E = (corners_EOI - corner_OI).square().sum(dim=(1, 2)) / energy_E
        best = int(errors_E.argmin())
        return float(errors_E[best]), names[best]
