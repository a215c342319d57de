"""The experts modules compute what the formats say, whole and in tensor-parallel shards."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lightship.checkpoint import Checkpoint
from lightship.errors import CheckpointError, ServingError
from lightship.experts import BF16Experts, FP8Experts, TensorParallel, W4AFP8Experts
from lightship.w4afp8 import dequantize_fp8_blocks, dequantize_int4, round_groups_through_fp8, round_through_fp8
from tests.quant.test_verify import as_bf16

LAYER = "model.layers.1.mlp"
TOKENS, HIDDEN, EXPERTS = 37, 128, 8


@pytest.fixture(scope="module")
def bf16(fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_bf16(fp8, tmp_path_factory.mktemp("bf16") / "tiny")


@pytest.fixture
def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden states, chosen experts and weights; expert 0 is never chosen."""
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    chosen_TK = torch.rand(TOKENS, EXPERTS - 1, generator=generator).topk(2).indices + 1
    return x_TH, chosen_TK, torch.rand(TOKENS, 2, generator=generator, dtype=torch.float64)


def naive(
    path: Path, x_TH: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor, activations: str
) -> torch.Tensor:
    """One token and one expert at a time, straight from the checkpoint's tensors."""
    reader = Checkpoint.open(path).reader()

    def weight(expert: int, projection: str) -> torch.Tensor:
        name = f"{LAYER}.experts.{expert}.{projection}.weight"
        if activations == "untouched":
            return reader.read(name).double()
        dequantize = dequantize_fp8_blocks if activations == "groups" else dequantize_int4
        return dequantize(reader.read(name), reader.read(f"{name}_scale_inv"), torch.float64)

    def rounded(x_I: torch.Tensor, expert: int, w: str) -> torch.Tensor:
        if activations == "untouched":
            return x_I
        if activations == "groups":
            return round_groups_through_fp8(x_I)
        if activations == "static":
            return round_through_fp8(x_I, reader.read(f"{LAYER}.experts.{expert}.{w}.input_scale").double())
        return round_through_fp8(x_I, x_I.abs().max() / 448)

    y_TH = torch.zeros_like(x_TH)
    for t in range(len(x_TH)):
        for expert, share in zip(chosen_TK[t].tolist(), weights_TK[t], strict=True):
            x_H = rounded(x_TH[t], expert, "w1")
            h_I = F.silu(weight(expert, "gate_proj") @ x_H) * (weight(expert, "up_proj") @ x_H)
            y_TH[t] += share * (weight(expert, "down_proj") @ rounded(h_I, expert, "w2"))
    return y_TH


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_w4afp8_experts_equal_a_naive_loop(
    w4afp8: Path, routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor], activations: str
) -> None:
    reader = Checkpoint.open(w4afp8).reader()
    module = W4AFP8Experts.load(reader, LAYER, TensorParallel(), torch.float64, activations)  # type: ignore[arg-type]
    torch.testing.assert_close(module(*routed), naive(w4afp8, *routed, activations), rtol=1e-10, atol=1e-12)


def test_fp8_experts_equal_a_naive_loop(fp8: Path, routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    module = FP8Experts.load(Checkpoint.open(fp8).reader(), LAYER, TensorParallel(), torch.float64)
    torch.testing.assert_close(module(*routed), naive(fp8, *routed, "groups"), rtol=1e-10, atol=1e-12)


def test_bf16_experts_equal_a_naive_loop(bf16: Path, routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    module = BF16Experts.load(Checkpoint.open(bf16).reader(), LAYER, TensorParallel(), torch.float64)
    torch.testing.assert_close(module(*routed), naive(bf16, *routed, "untouched"), rtol=1e-10, atol=1e-12)


def test_no_tokens_give_no_output(w4afp8: Path) -> None:
    module = W4AFP8Experts.load(Checkpoint.open(w4afp8).reader(), LAYER, TensorParallel())
    empty = module(torch.zeros(0, HIDDEN), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert empty.shape == (0, HIDDEN)


@pytest.mark.parametrize(
    ("experts", "checkpoint"), [(W4AFP8Experts, "w4afp8"), (FP8Experts, "fp8"), (BF16Experts, "bf16")]
)
def test_shards_narrow_w13_by_output_and_w2_by_input(
    experts: type[W4AFP8Experts | FP8Experts | BF16Experts], checkpoint: str, request: pytest.FixtureRequest
) -> None:
    reader = Checkpoint.open(request.getfixturevalue(checkpoint)).reader()
    w13_E2IH, w2_EHI = experts.load(reader, LAYER, TensorParallel()).expand()
    for rank in range(2):
        shard13, shard2 = experts.load(reader, LAYER, TensorParallel(rank, 2)).expand()
        rows = slice(128 * rank, 128 * (rank + 1))
        gate, up = w13_E2IH.chunk(2, dim=1)
        assert torch.equal(shard13, torch.cat([gate[:, rows], up[:, rows]], dim=1))
        assert torch.equal(shard2, w2_EHI[:, :, rows])


@pytest.mark.parametrize("degree", [3, 4, 8])
def test_an_indivisible_degree_names_the_possible_ones(w4afp8: Path, degree: int) -> None:
    with pytest.raises(
        ServingError,
        match=f"moe_intermediate_size 256 cannot be served at TP {degree}: .* multiple of 128.*possible degrees: 1, 2",
    ):
        W4AFP8Experts.load(Checkpoint.open(w4afp8).reader(), LAYER, TensorParallel(0, degree))


def test_the_layers_input_scale_is_the_maximum_over_its_experts(w4afp8: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(w4afp8, tmp_path / "copy")
    (shard,) = copy.glob("*.safetensors")
    tensors = load_file(shard)
    tensors[f"{LAYER}.experts.4.w2.input_scale"] *= 4
    tensors[f"{LAYER}.experts.5.w2.input_scale"] /= 4
    save_file(tensors, shard)
    module = W4AFP8Experts.load(Checkpoint.open(copy).reader(), LAYER, TensorParallel())
    assert float(module.w2_input_scale) == float(tensors[f"{LAYER}.experts.4.w2.input_scale"])


def test_a_missing_tensor_is_named(fp8: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.1\.mlp\.experts\.0\.w1\.input_scale"):
        W4AFP8Experts.load(Checkpoint.open(fp8).reader(), LAYER, TensorParallel())
