"""Calibration text: weighted scenes as whole sequences of tokens, and a digest of what decides them."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.causal_lm import load_tokenizer
from lightship.errors import LightshipError, RecipeError
from lightship.recipe import CalibrationText, FidelityText, TextSource, load_recipe
from lightship.text import digest_of_text, read_scenes, read_sequences
from tests.conftest import DEMO, ROOT, write_lines

ANYTHING = 1 << 40


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEMO)


def source(path: Path, **settings: Any) -> TextSource:
    return TextSource(scene="s", path=str(path), **settings)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=60), min_size=1, max_size=12),
    tokens=st.integers(8, 400),
)
def test_sequences_are_a_prefix_of_all_documents_joined_with_the_end_token(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokens: int
) -> None:
    tokenizer = load_tokenizer(DEMO)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    documents = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    joined = [i for ids in documents if ids for i in [*ids, tokenizer.eos_token_id]]
    whole = min(len(joined), tokens) // 8
    if not whole:
        with pytest.raises(LightshipError, match="fewer than one sequence of 8"):
            read_sequences(source(path), tokenizer, tokens, 8)
        return
    sequences = read_sequences(source(path), tokenizer, tokens, 8)
    assert all(s.shape == (8,) and s.dtype == torch.int64 for s in sequences)
    assert torch.cat(sequences).tolist() == joined[: whole * 8]


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
    (sequence,) = read_sequences(source(path), tokenizer, 4, 4)
    assert tokenizer.decode(sequence).startswith("one")


def test_weights_share_out_the_tokens_and_sources_of_a_scene_follow_one_another(tmp_path: Path, tokenizer: Any) -> None:
    first = write_lines(tmp_path / "first.jsonl", ["The ship leaves the harbour."] * 200)
    second = write_lines(tmp_path / "second.jsonl", ["def f(x): return x"] * 200)
    text = CalibrationText(
        sources=[
            TextSource(scene="mixed", path=str(first), weight=0.5),
            TextSource(scene="code", path=str(second)),
            TextSource(scene="mixed", path=str(second), weight=1.5),
        ],
        tokens_per_scene=256,
        sequence_tokens=64,
    )
    scenes = read_scenes(text, tokenizer)
    assert {scene: len(sequences) for scene, sequences in scenes.items()} == {"mixed": 8, "code": 4}
    assert torch.equal(
        torch.stack(scenes["mixed"][:2]), torch.stack(read_sequences(text.sources[0], tokenizer, 128, 64))
    )
    assert torch.equal(torch.stack(scenes["mixed"][2:6]), torch.stack(scenes["code"]))


def test_the_same_text_gives_the_same_sequences_twice(text: CalibrationText, tokenizer: Any) -> None:
    once, again = read_scenes(text, tokenizer), read_scenes(text, tokenizer)
    assert all(torch.equal(torch.stack(once[scene]), torch.stack(again[scene])) for scene in once)


@pytest.mark.parametrize(
    "change",
    [{"weight": 2.0}, {"thinking": True}, {"thinking": False}, {"column": "text"}, {"scene": "other"}],
    ids=lambda change: str(change),
)
def test_the_digest_changes_with_every_setting_that_changes_the_tokens(tmp_path: Path, change: dict[str, Any]) -> None:
    plain = source(write_lines(tmp_path / "a.jsonl", ["text"]))
    assert digest_of_text([plain]) != digest_of_text([msgspec.structs.replace(plain, **change)])


def test_the_digest_follows_content_and_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    here = source(write_lines(tmp_path / "a.jsonl", ["text"]))
    there = source(write_lines(tmp_path / "elsewhere" / "b.jsonl", ["text"]))
    assert digest_of_text([here]) == digest_of_text([there])
    other = source(write_lines(tmp_path / "c.jsonl", ["texts"]))
    assert digest_of_text([here]) != digest_of_text([other])
    assert digest_of_text([here, other]) != digest_of_text([other, here])


@pytest.mark.parametrize("texts", [["", ""], []], ids=["empty rows", "no rows"])
def test_a_scene_that_yields_no_tokens_is_named(tmp_path: Path, tokenizer: Any, texts: list[str]) -> None:
    path = write_lines(tmp_path / "empty.jsonl", texts * 600)
    with pytest.raises(
        LightshipError, match=r"scene 's': .*empty\.jsonl holds 0 tokens, fewer than one sequence of 512"
    ):
        read_sequences(source(path), tokenizer, 16384, 512)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "is not JSON"),
        ("[1]", "is not {.*but list"),
        ('{"content": "a"}', r"is not \{\"text\": …\} or .*it has content \(str\).*by `column`"),
        ('{"text": 5}', r"it has text \(int\)"),
        ('{"text": null}', r"it has text \(NoneType\)"),
        ('{"messages": "hi"}', "messages is not a list"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ("{}", "it has nothing"),
    ],
)
def test_an_unreadable_row_is_named_with_its_file(tmp_path: Path, tokenizer: Any, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    with pytest.raises(LightshipError, match=rf"rows\.jsonl:3:? .*{message}"):
        read_sequences(source(path), tokenizer, ANYTHING, 4)


def test_a_bad_row_after_the_last_wanted_one_is_never_read(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a good row of text"}\nnot JSON\n')
    assert read_sequences(source(path), tokenizer, 4, 4)


def test_a_missing_column_is_named(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ["text"])
    with pytest.raises(LightshipError, match=r"rows\.jsonl:1 has no text in column 'body'; it has text \(str\)"):
        read_sequences(source(path, column="body"), tokenizer, 4, 4)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{ scene = "s" }', "exactly one of path and dataset"),
        ('{ scene = "s", path = "a.jsonl", dataset = "org/name" }', "exactly one of path and dataset"),
        ('{ scene = "s", path = "a.jsonl", revision = "abc" }', "config, revision and split belong to a dataset"),
        ('{ scene = "s", path = "a.jsonl", weight = 0 }', r"> 0.* at `\$.calibration.sources\[0\].weight`"),
        ('{ scene = "s", path = "a.jsonl", weight = inf }', r"<= 1000.* at `\$.calibration.sources\[0\].weight`"),
        ('{ scene = "s", path = "a.jsonl", weight = nan }', "> 0.0"),
        ('{ scene = "s", path = "a.jsonl", weight = 0.01 }', "x weight 0.01 is 164, less than sequence_tokens 512"),
    ],
)
def test_an_impossible_source_is_refused_with_the_recipe(tmp_path: Path, entry: str, message: str) -> None:
    recipe = (ROOT / "recipes" / "demo.toml").read_text().replace("../demo", str(ROOT / "demo"))
    head, tail = recipe.split("sources = [", 1)
    path = tmp_path / "recipe.toml"
    path.write_text(f"{head}sources = [{entry}]{tail.split(']', 1)[1]}")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_local_dataset_is_relative_to_the_recipe_and_a_name_is_left_alone(tmp_path: Path) -> None:
    recipe = (ROOT / "recipes" / "demo.toml").read_text().replace("../demo", str(ROOT / "demo"))
    head, tail = recipe.split("sources = [", 1)
    sources = '{ scene = "a", dataset = "./data" }, { scene = "b", dataset = "org/name" }'
    path = tmp_path / "recipe.toml"
    path.write_text(f"{head}sources = [{sources}]{tail.split(']', 1)[1]}")
    assert [s.dataset for s in load_recipe(path).calibration.sources] == [str(tmp_path / "data"), "org/name"]


@pytest.mark.parametrize("recipe", ["demo.toml", "deepseek-v3.toml"])
def test_every_scene_of_a_shipped_recipe_gives_sequences(recipe: str, tokenizer: Any) -> None:
    shipped = load_recipe(ROOT / "recipes" / recipe)
    for text in (shipped.calibration, shipped.fidelity):
        few = msgspec.structs.replace(text, tokens_per_scene=4 * text.sequence_tokens)
        assert read_scenes(few, tokenizer).keys() == {s.scene for s in text.sources}


def test_the_deepseek_recipe_asks_for_512_sequences_of_2048_tokens() -> None:
    text = load_recipe(ROOT / "recipes" / "deepseek-v3.toml").calibration
    assert sum(round(text.tokens_per_scene * s.weight) for s in text.sources) == 512 * 2048
    assert text.sequence_tokens == 2048


def test_the_deepseek_recipes_held_out_text_is_in_no_calibration_scene() -> None:
    recipe = load_recipe(ROOT / "recipes" / "deepseek-v3.toml")
    seen, held_out = (
        {line for s in text.sources for line in Path(str(s.path)).read_text().splitlines()}
        for text in (recipe.calibration, recipe.fidelity)
    )
    assert not seen & held_out


def test_chinese_survives_the_demo_tokenizer(tokenizer: Any) -> None:
    chinese = (ROOT / "demo/training/passages/chinese.txt").read_text()
    assert tokenizer.decode(tokenizer.encode(chinese, add_special_tokens=False)) == chinese


def test_the_documentation_names_every_key_of_a_source() -> None:
    documented = (ROOT / "docs" / "recipes.md").read_text()
    assert [f.name for f in msgspec.structs.fields(TextSource) if f"`{f.name}`" not in documented] == []


def test_held_out_text_is_weighted_as_calibration_text_is(tmp_path: Path, tokenizer: Any) -> None:
    path = str(write_lines(tmp_path / "a.jsonl", ["The ship leaves the harbour."] * 100))
    text = FidelityText(sources=[TextSource(scene="s", path=path, weight=2)], tokens_per_scene=64, sequence_tokens=32)
    assert len(read_scenes(text, tokenizer)["s"]) == 4
