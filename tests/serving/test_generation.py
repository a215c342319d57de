from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightship.causal_lm import load_causal_lm, load_tokenizer
from lightship.serving import generation
from lightship.serving.generation import Generator, Piece, Sequence, SequenceError
from lightship.serving.ragged import RaggedModel
from lightship.serving.sampling import Sampling

PROMPTS = [[(7 * i + 13 * j) % 256 + 2 for i in range(20 + 9 * j)] for j in range(4)]
GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def parts(fp8_dir: Path) -> tuple[Any, Any]:
    return load_causal_lm(fp8_dir, dtype=torch.float64), load_tokenizer(fp8_dir)


@pytest.fixture
def make(parts: tuple[Any, Any]) -> Callable[..., Generator]:
    model, tokenizer = parts
    return lambda eos=frozenset(): Generator(RaggedModel(model).run, tokenizer, set(eos))


def finish(generator: Generator, *sequences: Sequence) -> list[list[Piece]]:
    for sequence in sequences:
        generator.add(sequence)
    pieces: dict[int, list[Piece]] = {sequence.id: [] for sequence in sequences}
    while not generator.idle:
        for sequence, piece in generator.step():
            assert isinstance(piece, Piece)
            pieces[sequence.id].append(piece)
    return list(pieces.values())


def test_a_batch_generates_what_each_prompt_does_alone(make: Callable[..., Generator]) -> None:
    together = [Sequence(prompt, GREEDY) for prompt in PROMPTS]
    finish(make(), *together)
    for prompt, sequence in zip(PROMPTS, together, strict=True):
        alone = Sequence(prompt, GREEDY)
        finish(make(), alone)
        assert alone.generated == sequence.generated


def test_a_newcomer_joins_between_steps(make: Callable[..., Generator]) -> None:
    first, second = Sequence(PROMPTS[0], GREEDY), Sequence(PROMPTS[1], GREEDY)
    generator = make()
    generator.add(first)
    for _ in range(3):
        generator.step()
    generator.add(second)
    generator.step()
    assert len(first.generated) == 4
    assert len(second.generated) == 1


def test_streamed_pieces_add_up_to_the_whole_answer(make: Callable[..., Generator]) -> None:
    sampling = Sampling(max_tokens=40, temperature=0, logprobs=2)
    [whole], streamed = finish(make(), Sequence(PROMPTS[0], sampling), Sequence(PROMPTS[0], sampling, streaming=True))
    assert len(streamed) > 5
    assert "".join(p.text for p in streamed) == whole.text
    assert [t for p in streamed for t in p.tokens] == whole.tokens
    assert [p.finish_reason for p in streamed] == [None] * (len(streamed) - 1) + ["length"]


def test_a_stop_string_ends_the_text_before_it(make: Callable[..., Generator]) -> None:
    [[plain]] = finish(make(), Sequence(PROMPTS[0], Sampling(max_tokens=40, temperature=0)))
    stop = plain.text[10:12]
    stopping = Sampling(max_tokens=40, temperature=0, stop=(stop,), logprobs=0)
    streaming = Sequence(PROMPTS[0], stopping, streaming=True)
    [[whole], streamed] = finish(make(), Sequence(PROMPTS[0], stopping), streaming)
    assert whole.finish_reason == "stop"
    assert whole.text == plain.text[: plain.text.index(stop)]
    assert "".join(p.text for p in streamed) == whole.text
    assert all(t.offset < len(whole.text) for t in whole.tokens)


def test_the_end_of_sequence_token_ends_it_unless_ignored(make: Callable[..., Generator]) -> None:
    plain = Sequence(PROMPTS[0], GREEDY)
    finish(make(), plain)
    eos = plain.generated[5]
    at = plain.generated.index(eos)
    ended, ignoring = Sequence(PROMPTS[0], GREEDY), Sequence(PROMPTS[0], Sampling(12, temperature=0, ignore_eos=True))
    [[piece], _] = finish(make({eos}), ended, ignoring)
    assert piece.finish_reason == "stop"
    assert ended.generated == plain.generated[: at + 1]
    assert ignoring.generated == plain.generated


def test_prompt_logprobs_are_those_of_a_direct_forward(make: Callable[..., Generator], parts: tuple[Any, Any]) -> None:
    sampling = Sampling(max_tokens=0, temperature=0, logprobs=3, prompt_logprobs=True)
    [[piece]] = finish(make(), Sequence(PROMPTS[2], sampling))
    model = parts[0]
    model.config._attn_implementation = "sdpa"
    logprobs = model(torch.tensor([PROMPTS[2]])).logits[0].float().log_softmax(-1)
    first, *others = piece.tokens
    assert first.likelihood is None
    assert piece.text == ""
    assert [t.id for t in piece.tokens] == PROMPTS[2]
    for row, token in zip(logprobs, others, strict=False):
        assert token.likelihood is not None
        assert token.likelihood.logprob == pytest.approx(float(row[token.id]), abs=1e-5)
        assert [i for i, _ in token.likelihood.top] == row.topk(3).indices.tolist()


def test_prompts_longer_than_a_step_are_read_in_parts(
    make: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_tokens=5, temperature=0, logprobs=1, prompt_logprobs=True)
    [[whole]] = finish(make(), Sequence(PROMPTS[3], sampling))
    monkeypatch.setattr(generation, "STEP_TOKENS", 7)
    [[in_parts], _] = finish(make(), Sequence(PROMPTS[3], sampling), Sequence(PROMPTS[1], sampling))
    assert in_parts.text == whole.text
    for a, b in zip(in_parts.tokens[1:], whole.tokens[1:], strict=True):
        assert a.likelihood is not None
        assert b.likelihood is not None
        assert a.likelihood.logprob == pytest.approx(b.likelihood.logprob, abs=1e-5)


def test_a_seed_repeats_its_draws_whoever_else_is_in_the_batch(make: Callable[..., Generator]) -> None:
    drawn = [Sequence(PROMPTS[0], Sampling(max_tokens=12, temperature=1.0, top_p=0.9, seed=s)) for s in (1, 1, 2)]
    finish(make(), *drawn)
    assert drawn[0].generated == drawn[1].generated
    assert drawn[0].generated != drawn[2].generated


def test_a_cancelled_sequence_makes_room(make: Callable[..., Generator]) -> None:
    generator = make()
    sequences = [Sequence(PROMPTS[0], GREEDY) for _ in range(generation.RUNNING + 1)]
    for sequence in sequences:
        generator.add(sequence)
    generator.step()
    assert len(generator.waiting) == 1
    generator.cancel(sequences[0])
    generator.step()
    assert sequences[-1].generated
    assert len(sequences[0].generated) == 1


@pytest.mark.parametrize(
    "broken",
    [Sampling(max_tokens=9, seed=2**64), Sampling(max_tokens=9, temperature=float("nan"))],
    ids=["at its start", "at a draw"],
)
def test_a_sequence_that_fails_leaves_the_others_alone(make: Callable[..., Generator], broken: Sampling) -> None:
    alone, beside, failing = Sequence(PROMPTS[0], GREEDY), Sequence(PROMPTS[0], GREEDY), Sequence(PROMPTS[1], broken)
    finish(make(), alone)
    generator = make()
    generator.add(failing)
    assert [type(piece) for _, piece in generator.step()] == [SequenceError]
    assert generator.idle
    finish(generator, beside)
    assert beside.generated == alone.generated


def test_a_prompts_special_tokens_have_offsets_but_not_those_the_tokenizer_added(
    make: Callable[..., Generator],
) -> None:
    sampling = Sampling(max_tokens=0, temperature=0, logprobs=0, prompt_logprobs=True)
    given, added = Sequence([0, 70, 71], sampling), Sequence([0, 70, 71], sampling, unwritten=1)
    [[written], [unwritten]] = finish(make(), given, added)
    assert [t.offset for t in written.tokens] == [0, 3, 4]
    assert [t.offset for t in unwritten.tokens] == [0, 0, 1]
