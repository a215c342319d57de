"""The embedded model is what its README says: small, in the released format, and able to show damage."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightship.causal_lm import load_tokenizer
from lightship.checkpoint import Checkpoint
from lightship.eval.fidelity import measure_fidelities
from lightship.eval.questions import read_questions
from lightship.quant.plan import plan_quantization
from lightship.recipe import CalibrationText, FidelityText, Quantization, load_recipe
from tests.conftest import DEMO, ROOT, quantize_checkpoint

FOLDER = DEMO.parent


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(DEMO)


def test_the_folder_takes_at_most_12_megabytes() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z", FOLDER], cwd=ROOT, capture_output=True, check=True, text=True)
    assert sum((ROOT / name).stat().st_size for name in tracked.stdout.split("\0") if name) <= 12_000_000


def test_it_is_a_deepseek_v3_moe_in_the_released_fp8_format(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (config["scoring_func"], config["topk_method"], config["first_k_dense_replace"]) == (
        "sigmoid",
        "noaux_tc",
        1,
    )
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["n_routed_experts"] >= 16
    assert config["moe_intermediate_size"] >= 256
    assert config["moe_intermediate_size"] % 128 == config["hidden_size"] % 128 == 0
    assert len(checkpoint.shards) > 1
    weight = checkpoint.info("model.layers.1.mlp.experts.0.gate_proj.weight")
    assert (weight.dtype, checkpoint.info(f"{weight.name}_scale_inv").dtype) == ("F8_E4M3", "F32")


def test_its_routed_experts_shrink_by_at_least_45_percent(checkpoint: Checkpoint) -> None:
    assert plan_quantization(checkpoint).experts_shrink >= 0.45


def test_the_recorded_accuracy_leaves_room_to_see_damage() -> None:
    recorded = json.loads((FOLDER / "training.json").read_text())["released_checkpoint"]
    assert recorded["fp8"]["questions"] == 400
    assert 0.7 <= recorded["fp8"]["overall"] <= 0.9


def test_questions_are_in_mmlu_pros_schema_and_never_called_so() -> None:
    keys = ["question_id", "question", "options", "answer", "answer_index", "cot_content", "category", "src"]
    for name, count in (("test", 400), ("validation", 25)):
        rows = [json.loads(line) for line in (FOLDER / "questions" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count
        for row in rows:
            assert list(row) == keys
            assert len(row["options"]) == len(set(row["options"])) == 10
            assert row["answer"] == "ABCDEFGHIJ"[row["answer_index"]]
            assert row["cot_content"].startswith("A: Let's think step by step. ")
            assert re.findall(r"answer is \(?([A-J])\)?", row["cot_content"])[0] == row["answer"]
            assert "mmlu" not in row["src"].lower()


def test_no_held_out_question_is_among_those_trained_on() -> None:
    program = (
        "import random, questions as q; rng = random.Random(3);"
        "print('\\n'.join(q.draw(rng, rng.choice(list(q.KINDS)), reserved=False).question for _ in range(20000)))"
    )
    drawn = subprocess.run(
        [sys.executable, "-c", program], cwd=FOLDER / "training", capture_output=True, check=True, text=True
    )
    trained = set(drawn.stdout.splitlines())
    assert len(trained) > 5000
    assert not trained & {q.question for q in read_questions(FOLDER / "questions").test}


def test_the_text_parts_share_no_document() -> None:
    for scene in ("prose", "code"):
        parts = [
            set((FOLDER / "text" / scene / f"{p}.jsonl").read_text().splitlines())
            for p in ("train", "calibration", "heldout")
        ]
        assert len(set.union(*parts)) == sum(map(len, parts))


def test_the_chat_template_marks_user_and_assistant() -> None:
    tokenizer = load_tokenizer(DEMO)
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith(tokenizer.bos_token)
    assert "What is 2 + 3?" in prompt
    assert tokenizer.decode(tokenizer.encode("The ship leaves at dawn.")) == "The ship leaves at dawn."


def test_each_rounding_method_moves_the_model_less_than_the_one_before(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "demo.toml")
    held_out = FidelityText(sources=recipe.fidelity.sources, tokens_per_scene=1024, sequence_tokens=256)
    paths = []
    # Text decides only what GPTQ writes: of the others it makes the input scales, which dynamic activations do not use.
    for settings, tokens in (
        (Quantization(method="absmax"), 256),
        (Quantization(method="mse", signed_scales=False), 256),
        (Quantization(method="mse"), 256),
        (Quantization(method="gptq"), 4096),
    ):
        text = CalibrationText(sources=recipe.calibration.sources, tokens_per_scene=tokens, sequence_tokens=256)
        paths.append(tmp_path / str(len(paths)))
        quantize_checkpoint(DEMO, paths[-1], text, settings)
    absmax, mse, signed, gptq = (fidelity.kl for fidelity in measure_fidelities(DEMO, paths, held_out))
    assert absmax > 0.02, "naive rounding costs measurable KL"
    assert absmax > 1.1 * mse > 1.1 * signed > 1.1 * gptq
