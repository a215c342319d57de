"""The number formats hold what they promise for any values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.w4afp8 import (
    dequantize_fp8_blocks,
    dequantize_int4,
    pack_int4,
    quantize_fp8_blocks,
    round_groups_through_fp8,
    round_through_fp8,
    unpack_int4,
)

seeds = st.integers(0, 2**31)


@given(seeds, st.integers(1, 5), st.integers(1, 64))
def test_packing_is_undone_by_unpacking_for_every_int4_value(seed: int, rows: int, pairs: int) -> None:
    q_OI = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(q_OI)), q_OI)


def test_the_even_input_is_the_low_nibble() -> None:
    assert pack_int4(torch.tensor([[-8, 7]], dtype=torch.int8)).view(torch.uint8).tolist() == [[0x78]]


def test_a_group_scale_covers_128_consecutive_inputs() -> None:
    packed = pack_int4(torch.ones(1, 256, dtype=torch.int8))
    w_OI = dequantize_int4(packed, torch.tensor([[2.0, -3.0]], dtype=torch.bfloat16))
    assert w_OI[0, :128].unique().tolist() == [2.0]
    assert w_OI[0, 128:].unique().tolist() == [-3.0]


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 300), st.integers(1, 300))
def test_fp8_blocks_restore_weights_to_within_an_fp8_step(seed: int, rows: int, columns: int) -> None:
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    q_OI, scale_inv = quantize_fp8_blocks(w_OI)
    assert scale_inv.shape == (-(-rows // 128), -(-columns // 128))
    # e4m3 has 3 mantissa bits: half a step is 1/16 of the value, or half the least subnormal of the block.
    allowed = w_OI.abs() / 16 + 2**-10 * scale_inv.max()
    assert ((dequantize_fp8_blocks(q_OI, scale_inv) - w_OI).abs() <= allowed).all()


def test_fp8_activations_saturate_instead_of_overflowing_to_nan() -> None:
    assert round_through_fp8(torch.tensor([1e6, -1e6]), 1.0).tolist() == [448.0, -448.0]


@pytest.mark.parametrize("inputs", [64, 128, 200])
def test_activation_groups_are_rounded_apart_from_one_another(inputs: int) -> None:
    x_TI = torch.full((2, inputs), 1e-4)
    x_TI[0, 0] = 400.0
    rounded = round_groups_through_fp8(x_TI)
    assert rounded[1].allclose(x_TI[1], rtol=0.07)
    assert (rounded[0, 1 : min(inputs, 128)] == 0).all(), "too small beside 400 in one group"
    assert rounded[0, 128:].allclose(x_TI[0, 128:], rtol=0.07)
