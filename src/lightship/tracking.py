"""What goes to MLflow: one flat run a release, the weights as an external model that is referenced and never uploaded,
and the registered model's aliases `challenger` and `champion`.

This is the only module that imports mlflow. The tracking server is MLFLOW_TRACKING_URI, else a SQLite file in the home.

    mlflow ui --backend-store-uri sqlite:///lightship-home/mlflow.db

docs/tracking.md says what is where.
"""

import json
import logging
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightship import lineage, summary
from lightship.contrast import ReleaseSide, side_of
from lightship.errors import LightshipError
from lightship.records import Override, Promoted, Verdict
from lightship.release import CHAMPION, ID_LENGTH, Release, StageDone

EXPERIMENT = "lightship"
RELEASE_TAG = "lightship.release_id"
MODEL_TAG = "lightship.model"
MANIFEST_TAG = "lightship.manifest_digest"
KIND_TAG = "mlflow.experimentKind"
"""Without it, MLflow's pages show the experiment as one about prompts and traces."""
NOTE_TAG = "mlflow.note.content"
"""What MLflow's pages show as description."""
VERDICT_TAG = "lightship.verdict"
PROMOTED_TAG = "lightship.promoted"
CHALLENGER = "challenger"
MODEL_STAGES = {
    "accuracy": "evaluation",
    "agreement": "evaluation",
    "comparison": "evaluation",
    "fidelity": "fidelity",
    "throughput": "fidelity",
}
"""Stages that measure the quantized model -> the context of the dataset on which: their metrics are the logged model's
too."""
MOST_METRICS = 1000
"""That MLflow takes in one request."""


def _mlflow() -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow


def _check_answers(url: str) -> None:
    """MLflow's own client retries for minutes before it says that nobody answers."""
    try:
        urllib.request.urlopen(url, timeout=10)
    except urllib.error.HTTPError:
        return
    except OSError as error:
        raise LightshipError(f"MLflow at {url} does not answer: {error}; check MLFLOW_TRACKING_URI") from error


@dataclass(frozen=True)
class Tracker:
    """A connection to one MLflow tracking server or SQLite file."""

    uri: str
    client: Any
    experiment_id: str

    @classmethod
    def connect(cls, home: Path) -> "Tracker":
        """Connect to MLFLOW_TRACKING_URI, or to `home`/mlflow.db, and find or make the experiment.

        Raises:
            LightshipError: the server does not answer.
        """
        mlflow = _mlflow()
        home.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(home / 'mlflow.db').resolve()}"
        local = uri.startswith("sqlite:")
        if uri.startswith("http"):
            _check_answers(uri)
        client = mlflow.MlflowClient(uri)
        try:
            experiment = client.get_experiment_by_name(EXPERIMENT)
            experiment_id = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(
                    EXPERIMENT, artifact_location=(home / "mlflow-artifacts").resolve().as_uri() if local else None
                )
            )
        except mlflow.exceptions.MlflowException as error:
            raise LightshipError(
                f"MLflow at {uri} does not answer: {error.message}; check MLFLOW_TRACKING_URI"
            ) from error
        if experiment is None or KIND_TAG not in experiment.tags:
            client.set_experiment_tag(experiment_id, KIND_TAG, "custom_model_development")
        return cls(uri, client, experiment_id)

    def run_of(self, release_id: str, name: str) -> "ReleaseRun":
        """The release's run: the existing one if the release was begun before."""
        runs = self.client.search_runs([self.experiment_id], f"tags.`{RELEASE_TAG}` = '{release_id}'", max_results=1)
        run = (
            runs[0]
            if runs
            else self.client.create_run(self.experiment_id, run_name=name, tags={RELEASE_TAG: release_id})
        )
        return ReleaseRun(self, run.info.run_id)

    def sides(self, release_ids: list[str] | None = None) -> list[ReleaseSide]:
        """These releases in this order, or all that have a run.

        Raises:
            LightshipError: a release has no run.
        """
        runs = self._all_runs() if release_ids is None else [self.find_run(release_id) for release_id in release_ids]
        models = {run.data.tags.get(MODEL_TAG) for run in runs} - {None}
        champions = {self.champion_release(model) for model in models}
        return [
            side_of(
                run.info.run_name,
                run.data.params,
                run.data.tags,
                run.data.metrics,
                champion=run.data.tags[RELEASE_TAG] in champions,
                at=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
            )
            for run in runs
        ]

    def find_run(self, release_id: str) -> Any:
        """The run of a release.

        Raises:
            LightshipError: it has none.
        """
        found = self.client.search_runs([self.experiment_id], f"tags.`{RELEASE_TAG}` = '{release_id}'", max_results=2)
        if len(found) != 1:
            raise LightshipError(f"MLflow at {self.uri} has {len(found)} runs of release {release_id}, not one")
        return found[0]

    def _all_runs(self) -> list[Any]:
        runs: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], f"tags.`{RELEASE_TAG}` != ''", page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def register(self, run_id: str, model: str, release_id: str, checkpoint: Path, manifest_digest: str) -> str:
        """Register a release's checkpoint as a version of `model`, the new `challenger`; returns the version.

        The weights stay where they are: the version points to an external model that names their URI and manifest. A
        release that is registered already keeps its version and moves no alias.
        """
        mlflow = _mlflow()
        from mlflow.entities import LoggedModelOutput

        parameters = self.client.get_run(run_id).data.params
        tags = {
            RELEASE_TAG: release_id,
            MANIFEST_TAG: manifest_digest,
            "lightship.uri": checkpoint.resolve().as_uri(),
        }
        if not self.client.search_registered_models(f"name = '{model}'"):
            self.client.create_registered_model(model)
        registered = self._versions(model, release_id, manifest_digest)
        if registered:
            return str(registered[0].version)
        mlflow.set_tracking_uri(self.uri)
        logged = mlflow.create_external_model(
            name=release_id,
            source_run_id=run_id,
            tags=tags,
            params={k: v for k, v in parameters.items() if k.startswith("quantization.")},
            model_type="w4afp8",
            experiment_id=self.experiment_id,
        )
        self.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        version = self.client.create_model_version(
            model, source=logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id
        )
        # MLflow's page of a logged model reads its versions here; its own fluent registration writes the same.
        versions = json.dumps([{"name": model, "version": version.version}])
        self.client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": versions})
        self.client.set_registered_model_alias(model, CHALLENGER, version.version)
        return str(version.version)

    def promote(self, model: str, version: str, override: Override | None = None) -> Promoted:
        """Give `champion` to a version; returns it with the version that was champion before.

        With `override`, version and run are tagged with who set the gate aside, and why; without, they lose such tags.
        """
        previous = self.champion(model)
        self.client.set_registered_model_alias(model, CHAMPION, version)
        chosen = self.client.get_model_version(model, version)
        self.client.set_tag(chosen.run_id, PROMOTED_TAG, version)
        run_tags = self.client.get_run(chosen.run_id).data.tags
        for name, value in _override_tags(override).items():
            if value is not None:
                self.client.set_model_version_tag(model, version, name, value)
                self.client.set_tag(chosen.run_id, name, value)
            elif name in run_tags:
                self.client.delete_model_version_tag(model, version, name)
                self.client.delete_tag(chosen.run_id, name)
        return Promoted(
            model=model,
            version=version,
            alias=CHAMPION,
            manifest_digest=chosen.tags[MANIFEST_TAG],
            previous_version=None if previous == version else previous,
            override=override,
        )

    def champion(self, model: str) -> str | None:
        """The version that is champion now."""
        version = self.client.get_registered_model(model).aliases.get(CHAMPION)
        return None if version is None else str(version)

    def champion_release(self, model: str) -> str | None:
        """The release that is champion now; None if there is no champion, or no such model yet."""
        if not self.client.search_registered_models(f"name = '{model}'"):
            return None
        version = self.champion(model)
        return None if version is None else str(self.client.get_model_version(model, version).tags[RELEASE_TAG])

    def version_of(self, model: str, release_id: str, manifest_digest: str) -> str:
        """The version of `model` that is this release with this manifest.

        Raises:
            LightshipError: there is none.
        """
        versions = self._versions(model, release_id, manifest_digest)
        if not versions:
            raise LightshipError(
                f"MLflow at {self.uri} has no version of {model} that is release {release_id} with manifest "
                f"{manifest_digest[:ID_LENGTH]}; release it again"
            )
        return str(versions[0].version)

    def _versions(self, model: str, release_id: str, manifest_digest: str) -> list[Any]:
        where = f"name = '{model}' and tags.`{RELEASE_TAG}` = '{release_id}'"
        return [v for v in self.client.search_model_versions(where) if v.tags.get(MANIFEST_TAG) == manifest_digest]


@dataclass(frozen=True)
class Measured:
    """A logged model's id, and the dataset on which it was measured."""

    model: str | None
    dataset_name: str | None
    dataset_digest: str | None


@dataclass(frozen=True)
class ReleaseRun:
    """One release's run."""

    tracker: Tracker
    run_id: str

    def log(
        self,
        *,
        parameters: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        curves: Mapping[str, Mapping[int, float]] | None = None,
        measured: "Measured | None" = None,
    ) -> None:
        """Log parameters, metrics and curves; a parameter that is logged already must have the same value.

        Args:
            curves: metric -> step -> value. Numbers that are not finite are left out.
            measured: the logged model whose metrics, but not curves, these are too.
        """
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        of = measured or Measured(None, None, None)
        points = [
            Metric(
                k, float(v), now, 0, model_id=of.model, dataset_name=of.dataset_name, dataset_digest=of.dataset_digest
            )
            for k, v in (metrics or {}).items()
        ]
        points += [Metric(k, float(v), now, step) for k, values in (curves or {}).items() for step, v in values.items()]
        points = [point for point in points if math.isfinite(point.value)]
        client = self.tracker.client
        client.log_batch(self.run_id, params=[Param(k, str(v)) for k, v in (parameters or {}).items()])
        for start in range(0, len(points), MOST_METRICS):
            client.log_batch(self.run_id, metrics=points[start : start + MOST_METRICS])

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Log a file as an artifact."""
        self.tracker.client.log_artifact(self.run_id, str(path), folder)

    def tag(self, name: str, value: str) -> None:
        self.tracker.client.set_tag(self.run_id, name, value)

    def log_release(self, release: Release) -> None:
        """Log what the release is made of: parameters, tags for its lineage, and the datasets that it reads."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        self.log(parameters=lineage.parameters(release))
        for name, value in lineage.tags(release).items():
            self.tag(name, value)
        inputs = [
            DatasetInput(
                Dataset(
                    name=used.name,
                    digest=used.digest,
                    source_type="local",
                    source=json.dumps({"uri": ", ".join(used.sources)}),
                    profile=json.dumps(used.profile),
                ),
                [InputTag("mlflow.data.context", used.context)],
            )
            for used in lineage.datasets(release)
        ]
        self.tracker.client.log_inputs(self.run_id, inputs)

    def log_stage(self, stage: StageDone, directory: Path) -> None:
        """Log a finished stage once: its metrics and curves, and its record as an artifact."""
        tag = f"stage.{stage.name}"
        if tag in self.tracker.client.get_run(self.run_id).data.tags:
            return
        prefix = "source/" if stage.name.startswith("source-") else ""
        self.log(
            metrics={prefix + k: v for k, v in summary.metrics(stage.record).items()},
            curves=summary.curves(stage.record),
            measured=self._measured(MODEL_STAGES[stage.name]) if stage.name in MODEL_STAGES else None,
        )
        self.log_file(directory / f"{stage.name}.json")
        self.tag(tag, f"{stage.seconds:.1f} s")

    def log_verdict(self, verdict: Verdict) -> None:
        """Tag the run, its logged model and its registered version with the decision, and describe them with why."""
        client = self.tracker.client
        not_met = [rule.rule for rule in verdict.rules if rule.decision != "pass"]
        headline = f"{verdict.decision}: {', '.join(not_met) or f'all {len(verdict.rules)} rules'}"
        why = "\n".join([headline, "", *(f"- {r.rule}: {r.explanation}" for r in verdict.rules)])
        self.tag(VERDICT_TAG, verdict.decision)
        self.tag(NOTE_TAG, why)
        model = self._model_id()
        if model is not None:
            client.set_logged_model_tags(model, {VERDICT_TAG: verdict.decision, NOTE_TAG: why})
        for version in client.search_model_versions(f"run_id = '{self.run_id}'"):
            client.set_model_version_tag(version.name, version.version, VERDICT_TAG, verdict.decision)
            client.update_model_version(version.name, version.version, why)

    def _model_id(self) -> str | None:
        """Of the logged model that this run made; None before it is registered."""
        outputs = self.tracker.client.get_run(self.run_id).outputs
        return outputs.model_outputs[0].model_id if outputs and outputs.model_outputs else None

    def _measured(self, context: str) -> "Measured":
        """The logged model on the run's dataset of this context."""
        inputs = self.tracker.client.get_run(self.run_id).inputs
        for used in inputs.dataset_inputs if inputs else []:
            if any(tag.value == context for tag in used.tags):
                return Measured(self._model_id(), used.dataset.name, used.dataset.digest)
        return Measured(self._model_id(), None, None)

    def __enter__(self) -> "ReleaseRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Mark the run as failed if the block raised, else as finished; an interrupted run is neither, and goes on.

        An interrupt may have cut a write to the SQLite file, which is then locked until this process ends.
        """
        while error is not None:
            if isinstance(error, KeyboardInterrupt):
                return
            error = error.__context__
        self.tracker.client.set_terminated(self.run_id, "FAILED" if kind else "FINISHED")


def _override_tags(override: Override | None) -> dict[str, str | None]:
    """Tag -> its value; None: it must not be there."""
    rules = f"{override.verdict}: {', '.join(override.rules)}" if override else None
    return {
        "lightship.override_by": override.by if override else None,
        "lightship.override_reason": override.reason if override else None,
        "lightship.override_verdict": rules,
        "lightship.override_at": override.at if override else None,
    }
