"""The loaded model is transformers' own, on dequantized weights."""

from pathlib import Path

import pytest
import torch

from lightship.causal_lm import FP8Linear, load_causal_lm, load_tokenizer
from lightship.checkpoint import Checkpoint
from lightship.errors import CheckpointError
from lightship.experts import FP8Experts, W4AFP8Experts
from lightship.w4afp8 import dequantize_fp8_blocks


@pytest.fixture
def exact_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave activations as they are, as transformers does."""
    for module in ("lightship.causal_lm", "lightship.experts"):
        monkeypatch.setattr(f"{module}.round_groups_through_fp8", lambda x: x)


def test_logits_equal_transformers_on_dequantized_weights(fp8: Path, exact_activations: None) -> None:  # noqa: ARG001
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = Checkpoint.open(fp8)
    reader = checkpoint.reader()
    config = AutoConfig.from_pretrained(fp8)
    del config.quantization_config
    config._experts_implementation = "eager"
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()

    def weight(name: str) -> torch.Tensor:
        if f"{name}_scale_inv" in checkpoint.tensors:
            return dequantize_fp8_blocks(reader.read(name), reader.read(f"{name}_scale_inv"), torch.float64)
        return reader.read(name).double()

    state = {}
    for name in reference.state_dict():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            pairs = [[weight(f"{stem}.{e}.{p}_proj.weight") for p in ("gate", "up")] for e in range(8)]
            state[name] = torch.stack([torch.cat(pair) for pair in pairs])
        elif last == "down_proj":
            state[name] = torch.stack([weight(f"{stem}.{e}.down_proj.weight") for e in range(8)])
        else:
            state[name] = weight(name)
    reference.load_state_dict(state)
    ids = torch.randint(2, 258, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            load_causal_lm(fp8, dtype=torch.float64)(ids).logits, reference(ids).logits, rtol=1e-6, atol=1e-6
        )


def test_each_format_gets_its_own_experts(fp8: Path, w4afp8: Path) -> None:
    assert isinstance(load_causal_lm(fp8).model.layers[1].mlp.experts, FP8Experts)
    assert isinstance(load_causal_lm(w4afp8).model.layers[1].mlp.experts, W4AFP8Experts)
    assert isinstance(load_causal_lm(w4afp8).model.layers[1].mlp.shared_experts.up_proj, FP8Linear)


def test_nothing_is_left_unloaded(w4afp8: Path) -> None:
    model = load_causal_lm(w4afp8)
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(t.is_meta for t in tensors)


def test_a_directory_without_a_tokenizer_says_so(broken: Path) -> None:
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no usable tokenizer"):
        load_tokenizer(broken)
