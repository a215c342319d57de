"""What MLflow is told, on a SQLite file and on a real server."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lightship import summary
from lightship.errors import LightshipError
from lightship.eval.comparison import compare
from lightship.files import write_json
from lightship.records import LayerError, Verification
from lightship.release import StageDone
from lightship.tracking import Tracker
from tests.eval.many_releases import finish_release
from tests.eval.release import accuracy, calibration, throughput
from tests.servers import free_port, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server; its address."""
    folder = tmp_path_factory.mktemp("mlflow")
    store, artifacts = f"sqlite:///{folder / 'mlflow.db'}", str(folder / "a")
    options = ["server", "--workers", "1", "--backend-store-uri", store, "--artifacts-destination", artifacts]
    with running("mlflow", *options, health="/health", log_file=folder / "log", environment=os.environ) as url:
        yield url


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, since MLflow takes seconds to make its tables; every test has releases and models of its own."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(params=["sqlite", "server"])
def tracker(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    if request.param == "server":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("server"))
    else:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Tracker.connect(home)


def test_a_release_has_one_run_however_often_it_is_opened(tracker: Tracker) -> None:
    first = tracker.run_of("aaaa00", "m-aaaa00")
    assert tracker.run_of("aaaa00", "m-aaaa00").run_id == first.run_id
    assert tracker.run_of("bbbb00", "m-bbbb00").run_id != first.run_id


def test_a_stage_is_logged_once_with_metrics_and_record(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.run_of("cccc00", "m-cccc00")
    layers = [LayerError(layer_name=f"model.layers.{i}.mlp", w13=0.01, w2=0.02 * i) for i in (1, 2, 10)]
    record = Verification(path="p", checks=[], layers=layers)
    write_json(tmp_path / "verification.json", record)
    for seconds in (1.0, 2.0):
        run.log_stage(StageDone("verification", record, False, seconds), tmp_path)
    logged = tracker.client.get_run(run.run_id)
    assert logged.data.metrics["verify/error_w2"] == pytest.approx(0.26 / 3)
    curve = tracker.client.get_metric_history(run.run_id, "by_layer/verified_error_w2")
    assert sorted((point.step, point.value) for point in curve) == [(1, 0.02), (2, 0.04), (10, 0.2)]
    assert logged.data.tags["stage.verification"] == "1.0 s"
    assert [f.path for f in tracker.client.list_artifacts(run.run_id)] == ["verification.json"]


def test_registering_references_the_weights_and_uploads_none(tracker: Tracker, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    run = tracker.run_of("dddd00", "m-dddd00")
    version = tracker.register(run.run_id, "m-register", "dddd00", checkpoint, "d" * 64)
    assert tracker.register(run.run_id, "m-register", "dddd00", checkpoint, "d" * 64) == version
    registered = tracker.client.get_model_version_by_alias("m-register", "challenger")
    assert str(registered.version) == version
    assert registered.tags["lightship.uri"] == checkpoint.as_uri()
    assert registered.run_id == run.run_id
    assert registered.source.startswith("models:/m-")


def test_an_older_release_registered_again_takes_no_alias_back(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.run_of("dddd01", "m-dddd01")
    first = tracker.register(run.run_id, "m-again", "dddd01", tmp_path, "a" * 64)
    second = tracker.register(run.run_id, "m-again", "dddd02", tmp_path, "a" * 64)
    assert tracker.register(run.run_id, "m-again", "dddd01", tmp_path, "a" * 64) == first
    assert str(tracker.client.get_model_version_by_alias("m-again", "challenger").version) == second


def test_promotion_moves_the_alias_and_tells_who_held_it(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.run_of("eeee00", "m-eeee00")
    versions = [tracker.register(run.run_id, "m-promote", name, tmp_path, "e" * 64) for name in ("eeee00", "eeee01")]
    assert tracker.promote("m-promote", versions[0]).previous_version is None
    promoted = tracker.promote("m-promote", tracker.version_of("m-promote", "eeee01", "e" * 64))
    assert (promoted.version, promoted.previous_version) == (versions[1], versions[0])
    assert tracker.promote("m-promote", versions[1]).previous_version is None, "it held the alias itself"
    assert str(tracker.client.get_model_version_by_alias("m-promote", "champion").version) == versions[1]


def test_an_unregistered_manifest_and_an_unknown_release_are_refused(tracker: Tracker) -> None:
    with pytest.raises(
        LightshipError, match="has no version of m-none that is release ffff99 with manifest 999999999999"
    ):
        tracker.version_of("m-none", "ffff99", "9" * 64)
    with pytest.raises(LightshipError, match="has 0 runs of release ffff99, not one"):
        tracker.sides(["ffff99"])


def test_a_run_is_marked_failed_when_its_release_fails(tracker: Tracker) -> None:
    run = tracker.run_of("abcd00", "m-abcd00")
    with pytest.raises(LightshipError), run:
        raise LightshipError("broken")
    assert tracker.client.get_run(run.run_id).info.status == "FAILED"


def test_an_interrupted_run_is_left_as_it_is_to_go_on(tracker: Tracker) -> None:
    run = tracker.run_of("abcd01", "m-abcd01")
    unwinding = ConnectionError("what unwinding ran into")
    unwinding.__context__ = KeyboardInterrupt()
    with pytest.raises(ConnectionError), run:
        raise unwinding
    assert tracker.client.get_run(run.run_id).info.status == "RUNNING"


def test_a_server_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(LightshipError, match=r"does not answer: .*; check MLFLOW_TRACKING_URI"):
        Tracker.connect(tmp_path)


def test_a_release_can_be_traced_compared_and_found_in_mlflow(tracker: Tracker, tmp_path: Path) -> None:
    release_id = finish_release(tmp_path, tracker, 0 if tracker.uri.startswith("sqlite") else 3, questions=200)
    (run,) = tracker.client.search_runs([tracker.experiment_id], f"tags.`lightship.release_id` = '{release_id}'")
    assert len(run.data.params) < 60, "few enough to read"
    assert run.data.params["calibration.sources"] == "prose; code; questions; dialogue"
    assert "accuracy.revision" not in run.data.params, "what is not set is no parameter"
    for name in ("lightship.source", "lightship.recipe", "identity.source", "identity.code", "lightship.verdict"):
        assert run.data.tags[name]
    digests = {i.dataset.name: i.dataset.digest for i in run.inputs.dataset_inputs}
    assert digests.keys() == {"lightship_demo", "calibration-text", "heldout-text"}
    assert len(set(digests.values())) == 3
    contexts = {tag.value for i in run.inputs.dataset_inputs for tag in i.tags}
    assert contexts == {"evaluation", "calibration", "fidelity"}
    assert tracker.client.get_experiment(tracker.experiment_id).tags["mlflow.experimentKind"]

    model = tracker.client.get_logged_model(run.outputs.model_outputs[0].model_id)
    measured = {metric.key: metric.value for metric in model.metrics}
    for name in ("accuracy", "accuracy_loss", "fidelity/kl", "throughput/ratio/c16", "agreement/same_answer"):
        assert measured[name] == run.data.metrics[name]
    assert not any(name.startswith(("source/", "by_")) for name in measured)
    assert model.params["quantization.method"] == "gptq"
    on = {metric.key: metric.dataset_name for metric in model.metrics}
    assert (on["accuracy"], on["fidelity/kl"]) == ("lightship_demo", "heldout-text")
    assert json.loads(model.tags["mlflow.modelVersions"])[0]["name"] == "lightship-demo", "its page shows its versions"

    version = tracker.client.search_model_versions(f"run_id = '{run.info.run_id}'")[0]
    assert version.tags["lightship.verdict"] == run.data.tags["lightship.verdict"]
    assert "accuracy_loss" in version.description


def test_a_series_has_its_steps_and_one_point_is_no_series() -> None:
    curves = summary.curves(throughput())
    assert curves["by_concurrency/quantized_ttft_p99_ms"].keys() == {1, 4, 16}
    one = msgspec.structs.replace(throughput(), loads=throughput().loads[:2])
    assert summary.curves(one) == {}
    right = accuracy([True, False, True, True])
    by_stage = summary.curves(compare(right, right, looks=[2, 4], planned=4))
    assert by_stage["by_questions/quantized_accuracy"] == {2: 0.5, 4: 0.75}


def test_a_model_of_58_layers_has_no_more_metrics_than_one_of_two() -> None:
    few, many = (summary.metrics(calibration(layers=n)).keys() for n in (2, 58))
    assert few == many
    assert len(summary.curves(calibration(layers=58))["by_layer/output_error_w13"]) == 58
