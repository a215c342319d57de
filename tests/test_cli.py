"""The command line answers at once, and ends a user's error with one line and exit code 2."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightship import __version__
from lightship.checkpoint import INDEX
from tests.commands import lightship, refusal
from tests.eval.puzzles import write_questions
from tests.eval.stub_server import serving
from tests.quant.test_quantize import poison

COMMANDS = ["plan", "quantize", "verify", "convert", "serve", "evaluate", "bench", "release", "promote", "report"]
COMMANDS += ["compare", "decide", "tune"]
RECIPE = """
model = "m"
[calibration]
tokens_per_scene = 1024
sequence_tokens = 256
sources = [{ scene = "prose", path = "prose.jsonl" }]
[accuracy]
questions = "questions"
[fidelity]
sources = [{ scene = "prose", path = "prose.jsonl" }]
[gate]
kl = 0.1
"""


def started(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command with an interpreter of its own."""
    return subprocess.run([sys.executable, "-m", "lightship", *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    text = "".join(json.dumps({"text": f"The ship number {i} leaves at dawn."}) + "\n" for i in range(60))
    (tmp_path / "prose.jsonl").write_text(text)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path / "recipe.toml"


def test_help_answers_in_under_300_milliseconds_warm() -> None:
    started("--help")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = started("--help")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_shows_an_example(command: str) -> None:
    assert f"example: lightship {command}" in started(command, "--help").stdout


def test_the_version_is_printed() -> None:
    assert started("--version").stdout == f"lightship {__version__}\n"


def test_plan_prints_sizes_and_writes_json(fp8: Path, tmp_path: Path) -> None:
    done = lightship("plan", fp8, "--no-probe", "--out", tmp_path / "plan.json")
    assert done.returncode == 0
    assert "routed experts, int4 group 128" in done.stdout
    assert "-48.4%" in done.stdout
    degrees = json.loads((tmp_path / "plan.json").read_text())["degrees"]
    assert [d["tp"] for d in degrees if not d["obstacles"]["routed experts"]] == [1, 2]
    assert [d["tp"] for d in degrees if not d["obstacles"]["attention"]] == [1], "a head's queries are 192 rows"
    assert re.search(r"^TP +attention +dense MLP +routed experts +shared experts +all ", done.stdout, re.MULTILINE)


def test_quantize_then_verify(fp8: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "w4afp8"
    done = lightship("quantize", fp8, out, "--recipe", recipe)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in out.parent.iterdir()] == ["w4afp8"], "the calibration is put away"
    verified = lightship("verify", out, "--against", fp8, "--out", tmp_path / "audit.json")
    assert verified.returncode == 0
    assert re.findall(r" (pass|warn|FAIL) ", verified.stdout) == ["pass"] * 5 + ["warn"] + ["pass"] * 10
    assert "error against the source" in verified.stdout
    (out / "tokenizer.json").unlink()
    failed = lightship("verify", out, "--against", fp8, "--out", tmp_path / "audit.json")
    assert failed.returncode == 1
    assert "tokenizer.json is missing" in failed.stdout
    assert "not servable as it is: manifest" in failed.stdout
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert [c["name"] for c in audit["checks"] if not c["passed"]] == ["manifest"]


def test_a_truncated_shard_is_refused(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard.name} is truncated" in refusal("plan", broken)


def test_a_tensor_missing_from_the_index_is_refused(broken: Path) -> None:
    index = json.loads((broken / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (broken / INDEX).write_text(json.dumps(index))
    assert "holds the tensor lm_head.weight" in refusal("plan", broken)


def test_a_nan_weight_is_refused_and_the_result_gets_no_name(broken: Path, recipe: Path, tmp_path: Path) -> None:
    name = poison(broken)
    out = tmp_path / "out" / "w4afp8"
    assert name in refusal("quantize", broken, out, "--recipe", recipe)
    assert [path.name for path in out.parent.iterdir()] == ["w4afp8.partial"], "what is done stays for the next run"


def test_an_unknown_recipe_key_is_refused(fp8: Path, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE + "[quantization]\nbits = 3\n")
    assert "unknown field `bits` - at `$.quantization`" in refusal(
        "quantize", fp8, tmp_path / "out", "--recipe", recipe
    )
    assert not (tmp_path / "out").exists()


def test_an_indivisible_degree_is_refused(w4afp8: Path) -> None:
    assert "moe_intermediate_size 256 cannot be served at TP 8" in refusal("serve", w4afp8, "--tp", "8", "--port", "0")


def test_a_port_in_use_is_refused(w4afp8: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in refusal("serve", w4afp8, "--port", str(port))


def test_a_missing_input_scale_is_refused_when_serving(w4afp8: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(w4afp8, tmp_path / "copy")
    (shard,) = copy.glob("*.safetensors")
    tensors = load_file(shard)
    del tensors["model.layers.1.mlp.experts.3.w2.input_scale"]
    save_file(tensors, shard)
    (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    assert "has no tensor model.layers.1.mlp.experts.3.w2.input_scale" in refusal("serve", copy, "--port", "0")


@pytest.mark.parametrize("option", [("--tp", "0"), ("--tp", "-1"), ("--port", "99999")])
def test_an_impossible_number_is_refused(w4afp8: Path, option: tuple[str, str]) -> None:
    done = lightship("serve", w4afp8, *option)
    assert done.returncode == 2
    assert f"argument {option[0]}: '{option[1]}' is not a whole number from" in done.stderr


def test_an_architecture_without_a_declaration_is_refused(broken: Path, recipe: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "minimax_m2"}))
    said = refusal("quantize", broken, tmp_path / "out", "--recipe", recipe)
    assert "config.json: model_type 'minimax_m2' is not supported" in said


def test_a_url_needs_a_tokenizer(recipe: Path) -> None:
    assert "is a URL: give --tokenizer DIR" in refusal("evaluate", "http://127.0.0.1:9", "--recipe", recipe)


def test_evaluating_asks_what_is_missing_and_all_of_it_when_told_to(recipe: Path, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "puzzles", {"biology": 3})
    chat = recipe.with_name("chat.toml")
    chat.write_text(RECIPE.replace('questions = "questions"', f'questions = "{questions}"\napi = "chat"'))
    (tmp_path / "key").write_text("sk-4711")
    with serving(None, key="sk-4711") as server:
        command = ["evaluate", server.endpoint.base_url, "--recipe", chat, "--home", tmp_path / "home"]
        command += ["--api-key-file", tmp_path / "key"]
        asked = []
        for more in (["--limit", "2"], [], [], ["--fresh"]):
            done = lightship(*command, *more, "--out", tmp_path / "accuracy.json")
            assert (done.returncode, "of 3 questions" in done.stdout) == (0, more != ["--limit", "2"]), done.stderr
            asked.append(len(server.bodies))
    assert asked == [2, 3, 3, 6]
    assert len(json.loads((tmp_path / "accuracy.json").read_text())["answers"]) == 3
    assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file() and b"sk-4711" in p.read_bytes()]


def test_a_server_that_is_not_there_is_named(recipe: Path, fp8: Path) -> None:
    said = refusal("evaluate", "http://127.0.0.1:9", "--tokenizer", fp8, "--recipe", recipe)
    assert "http://127.0.0.1:9/v1/models does not list a model" in said


def test_an_unknown_release_lists_the_known_ones(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "releases" / "abc")
    assert "an id that starts with 'f00'; there: abc" in refusal("promote", "f00", "--home", tmp_path)
