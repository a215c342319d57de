from pathlib import Path

import pytest
import torch

from lightship.causal_lm import load_causal_lm
from lightship.errors import ServingError
from lightship.serving.ragged import RaggedModel, Span, Step

PROMPTS = [[(7 * i + 13 * j) % 256 + 2 for i in range(40 + 9 * j)] for j in range(3)]


@pytest.fixture(scope="module")
def reference(w4afp8_dir: Path) -> list[torch.Tensor]:
    """Each prompt's logits from the plain transformers forward, in float64."""
    model = load_causal_lm(w4afp8_dir, dtype=torch.float64)
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]


@pytest.fixture
def model(w4afp8_dir: Path) -> RaggedModel:
    return RaggedModel(load_causal_lm(w4afp8_dir, dtype=torch.float64))


def same(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((logits - expected).norm() / expected.norm()) < 1e-6)


def test_sequences_in_one_step_do_not_see_one_another(model: RaggedModel, reference: list[torch.Tensor]) -> None:
    rows = model.run(Step([Span(j, prompt, len(prompt)) for j, prompt in enumerate(PROMPTS)]))
    for part, expected in zip(rows.split([len(p) for p in PROMPTS]), reference, strict=True):
        assert same(part, expected)


def test_cached_decode_equals_the_uncached_forward(model: RaggedModel, reference: list[torch.Tensor]) -> None:
    model.run(Step([Span(0, PROMPTS[0][:30], 0)]))
    for at in range(30, 40):
        assert same(model.run(Step([Span(0, PROMPTS[0][at : at + 1], 1)])), reference[0][at : at + 1])


def test_a_prompt_in_parts_beside_a_decoding_sequence(model: RaggedModel, reference: list[torch.Tensor]) -> None:
    model.run(Step([Span(0, PROMPTS[0][:39], 0), Span(1, PROMPTS[1][:20], 0)]))
    rows = model.run(Step([Span(0, PROMPTS[0][39:], 1), Span(1, PROMPTS[1][20:], 29)]))
    assert same(rows[:1], reference[0][39:])
    assert same(rows[1:], reference[1][20:])


def test_buffers_grow_beyond_their_first_capacity(model: RaggedModel) -> None:
    long = [i % 256 + 2 for i in range(600)]
    whole = model.run(Step([Span(0, long, 1)]))
    model.run(Step([Span(1, long[:100], 0)]))
    model.run(Step([Span(1, long[100:500], 0)]))
    assert same(model.run(Step([Span(1, long[500:], 1)])), whole)


def test_ended_sequences_are_forgotten(model: RaggedModel) -> None:
    model.run(Step([Span(0, PROMPTS[0], 1)]))
    model.run(Step([Span(1, PROMPTS[1], 1)], ended=[0]))
    assert list(model.sequences) == [1]


def test_an_unknown_architecture_is_refused(w4afp8_dir: Path) -> None:
    unknown = load_causal_lm(w4afp8_dir)
    unknown.config.model_type = "deepseek_v32"
    with pytest.raises(ServingError, match=r"deepseek_v32.*engine sglang"):
        RaggedModel(unknown)
