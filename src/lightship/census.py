"""The key census: a checkpoint's tensors against its family's declaration, from headers alone.

census(Checkpoint.open(path)).missing       # names that the declaration expects and no shard holds
"""

from dataclasses import dataclass

from lightship.checkpoint import Checkpoint
from lightship.errors import CheckpointError
from lightship.weights import BLOCK, Weight

SCALE = "_scale_inv"
"""Ends the name of an FP8 weight's block scales."""


@dataclass(frozen=True)
class Census:
    """What a checkpoint holds, and lacks, of what its family's declaration expects."""

    expected: dict[str, Weight]
    """By name, without the MTP layers that config.json declares and the release leaves out whole."""
    missing: list[str]
    unexpected: list[str]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Name -> (shape, expected shape)."""
    mtp_declared: int
    mtp_found: int

    @property
    def complete(self) -> bool:
        """Whether the model can be built: tensors that nobody expects are no obstacle."""
        return not self.missing and not self.misshapen


def census(checkpoint: Checkpoint) -> Census:
    """Compare names and shapes with the declaration; an FP8 weight needs its scales too.

    Raises:
        CheckpointError: the family is unknown, or config.json lacks a size that its declaration needs.
    """
    family, config = checkpoint.architecture, checkpoint.config
    sizes = checkpoint.dimensions
    try:
        expected = family.weights(config)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None
    mtp_names = [f"{family.layer_name(sizes.num_hidden_layers + n)}." for n in range(sizes.mtp_layers)]
    left_out = tuple(m for m in mtp_names if not any(name.startswith(m) for name in checkpoint.tensors))
    if left_out:
        expected = {name: weight for name, weight in expected.items() if not name.startswith(left_out)}
    shapes = {}
    missing = []
    for name, weight in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            missing += [] if weight.optional else [name]
            continue
        shapes[name] = weight.shape
        if info.dtype == "F8_E4M3":
            shapes[name + SCALE] = blocks_of(weight.shape)
            missing += [] if name + SCALE in checkpoint.tensors else [name + SCALE]
    return Census(
        expected=expected,
        missing=missing,
        unexpected=[name for name in checkpoint.tensors if name not in shapes],
        misshapen={
            name: (checkpoint.tensors[name].shape, shape)
            for name, shape in shapes.items()
            if name in checkpoint.tensors and checkpoint.tensors[name].shape != shape
        },
        mtp_declared=sizes.mtp_layers,
        mtp_found=len(mtp_names) - len(left_out),
    )


def blocks_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of an FP8 weight's scales: one for each block of 128 x 128, the last of a side perhaps smaller."""
    return tuple(-(-side // BLOCK) for side in shape)
