"""The same model has no divergence from itself, and the numbers are those of a direct computation."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightship.causal_lm import load_causal_lm, load_tokenizer
from lightship.errors import EvaluationError
from lightship.eval import fidelity
from lightship.eval.fidelity import measure_fidelities, measure_fidelity
from lightship.recipe import CalibrationText, FidelityText
from lightship.text import read_sequences


@pytest.fixture(scope="module")
def held_out(text: CalibrationText) -> FidelityText:
    return FidelityText(sources=text.sources, tokens_per_scene=640, sequence_tokens=64)


def test_a_model_is_identical_to_itself(fp8: Path, held_out: FidelityText) -> None:
    result = measure_fidelity(fp8, fp8, held_out)
    assert [(s.scene, s.tokens) for s in result.scenes] == [("prose", 630), ("code", 630)]
    assert (result.kl, result.top1_agreement) == (0.0, 1.0)
    assert result.scenes[0].perplexity_source == result.scenes[0].perplexity_quantized


def test_the_measures_are_those_of_a_direct_computation(fp8: Path, w4afp8: Path, held_out: FidelityText) -> None:
    scene = measure_fidelity(fp8, w4afp8, held_out).scenes[0]
    sequences = torch.stack(read_sequences(held_out.sources[0], load_tokenizer(fp8), 640, 64))
    with torch.inference_mode():
        p, q = (load_causal_lm(path)(sequences).logits[:, :-1].double().softmax(-1) for path in (fp8, w4afp8))
    nll = [-x.gather(-1, sequences[:, 1:, None]).log().mean().item() for x in (p, q)]
    assert scene.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)
    assert scene.kl > 0
    assert scene.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert [scene.perplexity_source, scene.perplexity_quantized] == pytest.approx([math.exp(x) for x in nll], rel=1e-5)


def test_each_layer_is_compared_by_what_its_output_would_predict(
    fp8: Path, w4afp8: Path, held_out: FidelityText
) -> None:
    scene = measure_fidelity(fp8, w4afp8, held_out).scenes[0]
    sequences = torch.stack(read_sequences(held_out.sources[0], load_tokenizer(fp8), 640, 64))
    left: dict[str, torch.Tensor] = {}
    for path in (fp8, w4afp8):
        model = load_causal_lm(path)
        first = model.model.layers[0]
        first.register_forward_hook(lambda *given, path=path: left.update({path.name: given[-1]}))
        with torch.inference_mode():
            model(sequences)
            x = left[path.name]
            x = x[0] if isinstance(x, tuple) else x
            left[path.name] = model.lm_head(model.model.norm(x))[:, :-1].double().log_softmax(-1)
    p, q = left[fp8.name], left[w4afp8.name]
    assert scene.kl_by_layer[0] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-2, abs=1e-6)
    assert len(scene.kl_by_layer) == len(model.model.layers)
    assert scene.kl_by_layer[-1] == scene.kl


def test_batches_do_not_change_the_result(
    fp8: Path, w4afp8: Path, held_out: FidelityText, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = measure_fidelity(fp8, w4afp8, held_out)
    monkeypatch.setattr(fidelity, "TOKENS_A_BATCH", 64)
    assert measure_fidelity(fp8, w4afp8, held_out).kl == pytest.approx(together.kl, rel=1e-3)


def test_several_models_are_compared_in_one_pass_over_the_source(
    fp8: Path, w4afp8: Path, held_out: FidelityText, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = measure_fidelity(fp8, w4afp8, held_out)
    reads: list[object] = []
    direct = fidelity._states
    monkeypatch.setattr(fidelity, "_states", lambda model, ids: reads.append(model) or direct(model, ids))
    identical, quantized = measure_fidelities(fp8, [fp8, w4afp8], held_out)
    assert identical.kl == 0.0
    assert quantized.scenes == alone.scenes
    assert len(reads) == 3 * len(held_out.sources)


def test_a_model_that_gives_no_probabilities_is_named(
    fp8: Path, held_out: FidelityText, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, **_: object) -> Callable[..., object]:
        model = load_causal_lm(path)
        model.lm_head.weight.data[0] = math.inf
        return model

    monkeypatch.setattr("lightship.causal_lm.load_causal_lm", broken)
    with pytest.raises(EvaluationError, match="tiny or its source gives non-finite probabilities on scene 'prose'"):
        measure_fidelity(fp8, fp8, held_out)


def test_a_layer_whose_output_predicts_nothing_finite_is_an_error_even_if_the_last_does(
    fp8: Path, held_out: FidelityText, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_first(model: object, ids: torch.Tensor) -> list[torch.Tensor]:
        first, *others = states(model, ids)
        return [torch.full_like(first, math.nan), *others]

    states = fidelity._states
    monkeypatch.setattr(fidelity, "_states", without_first)
    with pytest.raises(EvaluationError, match="non-finite probabilities on scene 'prose'"):
        measure_fidelity(fp8, fp8, held_out)
