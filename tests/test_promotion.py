"""Promotion is refused unless what was evaluated is what would be promoted."""

import shutil
from pathlib import Path

import pytest

from lightship.checkpoint import MANIFEST
from lightship.errors import CheckpointError, PromotionError
from lightship.files import digest_of_file, write_json
from lightship.promotion import Signature, promote
from lightship.records import RuleResult, Staged, Verdict
from lightship.tracking import Tracker


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, since MLflow takes seconds to make its tables; every test has a model of its own."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def tracker(home: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Tracker.connect(home)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The registered model's name."""
    return tmp_path.name


@pytest.fixture
def directory(w4afp8: Path, tmp_path: Path, tracker: Tracker, model: str) -> Path:
    """A finished release that passed its gate."""
    directory = tmp_path / "abc123"
    checkpoint = shutil.copytree(w4afp8, directory / "checkpoint")
    digest = digest_of_file(checkpoint / MANIFEST)
    write_verdict(directory, "pass")
    staged = Staged(
        engine="local",
        base_url="http://127.0.0.1:1",
        command=[],
        tensor_parallel=1,
        manifest_digest=digest,
        ready_seconds=1.0,
        greeting="hello",
    )
    write_json(directory / "staged.json", staged)
    run = tracker.run_of("abc123", "m-abc123")
    tracker.register(run.run_id, model, "abc123", checkpoint, digest)
    tracker.register(run.run_id, model, "another", checkpoint, digest)
    return directory


def write_verdict(directory: Path, decision: str) -> None:
    rule = RuleResult(rule="kl", decision=decision, value="0.2", limit="0.1", explanation="too far")  # type: ignore[arg-type]
    write_json(directory / "verdict.json", Verdict(decision=decision, rules=[rule]))  # type: ignore[arg-type]


def test_a_passing_release_becomes_champion(directory: Path, tracker: Tracker, model: str) -> None:
    promoted = promote(directory, model, tracker)
    assert promoted.alias == "champion"
    assert promoted.version == "1"


@pytest.mark.parametrize("decision", ["fail", "inconclusive"])
def test_a_verdict_that_is_not_pass_is_refused_with_its_reason(
    directory: Path, tracker: Tracker, model: str, decision: str
) -> None:
    write_verdict(directory, decision)
    with pytest.raises(PromotionError, match=rf"its verdict is {decision}: kl: too far.* See .*/abc123/why-not.md"):
        promote(directory, model, tracker)
    assert "champion" not in tracker.client.get_registered_model(model).aliases


def test_a_person_may_set_the_verdict_aside_and_is_recorded(directory: Path, tracker: Tracker, model: str) -> None:
    write_verdict(directory, "fail")
    promoted = promote(directory, model, tracker, Signature("Ada", "the text is not ours"))
    assert promoted.override is not None
    assert (promoted.override.by, promoted.override.reason) == ("Ada", "the text is not ours")
    assert (promoted.override.verdict, promoted.override.rules) == ("fail", ["kl"])
    version = tracker.client.get_model_version(model, promoted.version)
    run = tracker.client.get_run(version.run_id)
    for tags in (version.tags, run.data.tags):
        assert tags["lightship.override_by"] == "Ada"
        assert tags["lightship.override_reason"] == "the text is not ours"
        assert tags["lightship.override_verdict"] == "fail: kl"
    assert tracker.champion_release(model) == "abc123"


def test_a_promotion_without_an_override_takes_the_tags_of_an_earlier_one_back(
    directory: Path, tracker: Tracker, model: str
) -> None:
    write_verdict(directory, "fail")
    promote(directory, model, tracker, Signature("Ada", "because"))
    write_verdict(directory, "pass")
    promoted = promote(directory, model, tracker, Signature("Ada", "because"))
    assert promoted.override is None, "a passing release needs none"
    assert "lightship.override_by" not in tracker.client.get_model_version(model, promoted.version).tags


@pytest.mark.parametrize(("by", "reason"), [("", "because"), ("Ada", " ")])
def test_an_override_without_name_or_reason_is_refused(by: str, reason: str) -> None:
    with pytest.raises(PromotionError, match="needs a name and a reason"):
        Signature(by, reason)


def test_an_override_does_not_excuse_a_changed_file(directory: Path, tracker: Tracker, model: str) -> None:
    write_verdict(directory, "fail")
    with (directory / "checkpoint" / MANIFEST).open("a") as file:
        file.write("\n")
    with pytest.raises(PromotionError, match=r"its manifest is .*, what was evaluated had"):
        promote(directory, model, tracker, Signature("Ada", "because"))


def test_a_changed_weight_is_refused_by_name(directory: Path, tracker: Tracker, model: str) -> None:
    (shard,) = (directory / "checkpoint").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{shard.name} has changed since it was quantized"):
        promote(directory, model, tracker)


def test_another_manifest_than_the_evaluated_one_is_refused(directory: Path, tracker: Tracker, model: str) -> None:
    with (directory / "checkpoint" / MANIFEST).open("a") as file:
        file.write("\n")
    with pytest.raises(PromotionError, match=r"its manifest is .*, what was evaluated had"):
        promote(directory, model, tracker)


def test_an_unfinished_release_is_refused(tmp_path: Path, tracker: Tracker) -> None:
    with pytest.raises(PromotionError, match="release none is unfinished"):
        promote(tmp_path / "none", "m", tracker)


def test_a_release_judged_against_another_champion_than_todays_is_refused(
    directory: Path, model: str, tracker: Tracker
) -> None:
    compared = RuleResult(
        rule="kl", decision="pass", value="0.1", limit="0.1", explanation="as good", against="champion"
    )
    write_json(directory / "verdict.json", Verdict(decision="pass", rules=[compared], champion="yesterdays"))
    with pytest.raises(PromotionError, match="judged against yesterdays"):
        promote(directory, model, tracker)
    assert tracker.champion(model) is None
    write_json(directory / "verdict.json", Verdict(decision="pass", rules=[compared], champion=None))
    assert promote(directory, model, tracker).version == tracker.champion(model)
