"""A recipe is read strictly: what lightship does not know, it refuses by name."""

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from lightship.errors import RecipeError
from lightship.policy import load_policy
from lightship.recipe import Recipe, TaskSource, load_recipe
from lightship.section import Section

ROOT = Path(__file__).parents[1]
MINIMAL = """
model = "m"
[calibration]
sources = [{ scene = "prose", path = "text/prose.jsonl" }]
[accuracy]
questions = "questions"
[fidelity]
sources = [{ scene = "prose", path = "text/heldout.jsonl" }]
[gate]
unparsed = 0.1
accuracy_loss = 0.1
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.calibration.sources[0].path == str(tmp_path / "text/prose.jsonl")
    assert recipe.accuracy.questions == str(tmp_path / "questions")


def test_further_tasks_are_names_or_tables_with_a_path_of_their_own(tmp_path: Path) -> None:
    tasks = 'tasks = ["aime25", { name = "gsm8k", path = "data/gsm8k", limit = 5 }]'
    recipe = load_recipe(write(tmp_path, MINIMAL.replace('questions = "questions"', tasks)))
    assert recipe.accuracy.task_name == "mmlu_pro"
    assert recipe.accuracy.task_sources == [
        TaskSource(name="aime25"),
        TaskSource(name="gsm8k", path=str(tmp_path / "data/gsm8k"), limit=5),
    ]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('questions = "questions"\nrevision = "4c2a"', "revision belongs to MMLU-Pro from the Hub"),
        ('tasks = ["gsm8k", { name = "gsm8k", limit = 5 }]', "tasks names gsm8k more than once"),
        ('api = "responses"', r"Invalid enum value 'responses' - at `\$.accuracy.api`"),
    ],
)
def test_questions_that_contradict_themselves_are_refused(said: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, MINIMAL.replace('questions = "questions"', said)))


@pytest.mark.parametrize("shipped", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_recipe_loads(shipped: Path) -> None:
    load_recipe(shipped)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("[quantisation]\nmethod = 'mse'\n", "unknown field `quantisation`"),
        ("[quantization]\nmethods = 'mse'\n", r"unknown field `methods` - at `\$.quantization`"),
        ("[quantization]\nmethod = 'awq'\n", r"Invalid enum value 'awq' - at `\$.quantization.method`"),
        ("[serving]\ntp = 0\n", r"`int` >= 1 - at `\$.serving.tp`"),
        ("[cluster]\nworkers = 0\n", r"`int` >= 1 - at `\$.cluster.workers`"),
        ("[cluster]\n", "cluster needs exactly one of workers and scheduler"),
        ("[cluster]\nworkers = 2\nscheduler = 'tcp://a:8786'\n", "cluster needs exactly one of workers and scheduler"),
        ("[cluster]\nscheduler = 'head:8786'\n", "cluster.scheduler 'head:8786' is no address like tcp://host:8786"),
        ("[cluster]\nscheduler = 'tcp://head'\n", "cluster.scheduler 'tcp://head' is no address like tcp://host:8786"),
        ("[throughput]\nrequests = 4\nconcurrencies = [8]\n", "requests 4 never reach a concurrency of 8"),
        ("[throughput]\nrate = 0.0\n", r"`float` > 0.0 - at `\$.throughput.rate`"),
        ("[throughput]\nrate = 2.0\nwarmup_requests = 16\n", "warmup_requests 16 leave none of 16 requests"),
        ("[throughput]\ntrace = { path = 't.csv', fit = 'wrap' }\n", "Invalid enum value 'wrap'"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, added: str, message: str) -> None:
    path = write(tmp_path, MINIMAL + added)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("rule", ["kl = 'small'", "unparsed = 2.0"])
def test_a_wrong_rule_is_named(tmp_path: Path, rule: str) -> None:
    with pytest.raises(RecipeError, match=rf"at `\$\.gate\.{rule.split()[0]}`"):
        load_recipe(write(tmp_path, MINIMAL.replace("unparsed = 0.1", rule)))


def test_a_gate_that_would_promote_any_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the gate needs accuracy_loss or kl"):
        load_recipe(write(tmp_path, MINIMAL.replace("accuracy_loss = 0.1", "")))


def test_a_gate_that_asks_the_champion_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the gate needs accuracy_loss or kl"):
        load_recipe(write(tmp_path, MINIMAL.replace("accuracy_loss = 0.1", "kl = { over_champion = 0.1 }")))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("kl = {}", "a rule needs at_most, over_source or over_champion"),
        ("top1_agreement = {}", "a rule needs at_least, under_source or under_champion"),
        ("kl = { at_least = 0.1 }", "unknown field `at_least`"),
        ("fit = { cache_tokens = 1 }", "missing required field `gpu`"),
        ("confidence = 1.0", r"\$.gate.confidence"),
    ],
)
def test_a_rule_in_the_wrong_shape_is_named(tmp_path: Path, rule: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, f"{MINIMAL}{rule}\n"))


def test_every_rule_reads_as_a_number_and_as_a_table(tmp_path: Path) -> None:
    path = write(tmp_path, "[gate]\nkl = 0.1\ntruncated = { at_most = 0.02, over_source = 0.01, over_champion = 0 }\n")
    gate = load_policy(path)
    assert gate.limits("kl") == [("limit", 0.1)]
    assert gate.limits("truncated") == [("limit", 0.02), ("source", 0.01), ("champion", 0)]
    assert gate.limits("unparsed") == []
    assert gate.by_champion


def test_a_recipe_is_a_policy_and_a_file_without_a_gate_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_policy(path) == load_recipe(path).gate
    with pytest.raises(RecipeError, match=r"the policy .* has no table \[gate\]"):
        load_policy(write(tmp_path, "kl = 0.1"))
    with pytest.raises(RecipeError, match="the gate needs accuracy_loss or kl"):
        load_policy(write(tmp_path, "[gate]\ntruncated = 0.1"))


@pytest.mark.parametrize("stages", ["[]", "[0.5]", "[0.5, 0.2, 1.0]", "[0.5, 0.5, 1.0]"])
def test_stages_must_grow_to_the_whole(tmp_path: Path, stages: str) -> None:
    with pytest.raises(RecipeError, match="must increase and end with 1"):
        load_recipe(write(tmp_path, MINIMAL.replace("[fidelity]", f"stages = {stages}\n[fidelity]")))


def test_what_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a TOML file"):
        load_recipe(write(tmp_path, "model = "))
    with pytest.raises(RecipeError, match="is not a TOML file"):
        load_recipe(tmp_path)


def test_a_missing_recipe_says_where_recipes_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist; recipes/ holds the shipped ones"):
        load_recipe(tmp_path / "absent.toml")


def test_the_documentation_names_every_key() -> None:
    documented = (ROOT / "docs" / "recipes.md").read_text()

    def missing(section: type) -> list[str]:
        found = []
        for field in msgspec.structs.fields(section):
            inside = sections(field.type)
            written = f"[{field.name}]" if inside and section is Recipe else field.name
            found += [written] * (f"`{written}`" not in documented) + [key for kind in inside for key in missing(kind)]
        return found

    def sections(kind: object) -> list[type]:
        """The sections that a field holds: itself, one or none, or a list of them."""
        if isinstance(kind, type) and issubclass(kind, Section):
            return [kind]
        return [section for part in get_args(kind) for section in sections(part)]

    assert missing(Recipe) == []
