"""What goes to MLflow: one flat run a release, the weights as an external model that is referenced and never uploaded,
and the registered model's aliases `challenger` and `champion`.

This is the only module that imports mlflow. The tracking server is MLFLOW_TRACKING_URI, else a SQLite file in the home.

    mlflow ui --backend-store-uri sqlite:///lightship-home/mlflow.db
"""

import logging
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lightship import summary
from lightship.errors import LightshipError
from lightship.records import Override, Promoted
from lightship.release import ID_LENGTH, Release, StageDone, settings_of, versions

EXPERIMENT = "lightship"
RELEASE_TAG = "lightship.release_id"
MANIFEST_TAG = "lightship.manifest_digest"
CHALLENGER, CHAMPION = "challenger", "champion"


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

    def runs(self, release_ids: list[str]) -> list[Any]:
        """The runs of these releases, in this order.

        Raises:
            LightshipError: a release has no run.
        """
        found = []
        for release_id in release_ids:
            where = f"tags.`{RELEASE_TAG}` LIKE '{release_id}%'"
            runs = self.client.search_runs([self.experiment_id], where, max_results=2)
            if len(runs) != 1:
                raise LightshipError(f"MLflow at {self.uri} has {len(runs)} runs of release {release_id}, not one")
            found += runs
        return found

    def register(self, run_id: str, model: str, release_id: str, checkpoint: Path, manifest_digest: str) -> str:
        """Register a release's checkpoint as a version of `model`, the new `challenger`; returns the version.

        The weights stay where they are: the version points to an external model that names their URI and manifest. A
        release that is registered already keeps its version and moves no alias.
        """
        mlflow = _mlflow()
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
            name=release_id, source_run_id=run_id, tags=tags, model_type="w4afp8", experiment_id=self.experiment_id
        )
        version = self.client.create_model_version(
            model, source=logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id
        )
        self.client.set_registered_model_alias(model, CHALLENGER, version.version)
        return str(version.version)

    def promote(self, model: str, version: str, override: Override | None = None) -> Promoted:
        """Give `champion` to a version; returns it with the version that was champion before.

        With `override`, version and run are tagged with who set the gate aside, and why; without, they lose such tags.
        """
        previous = self.champion(model)
        self.client.set_registered_model_alias(model, CHAMPION, version)
        chosen = self.client.get_model_version(model, version)
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
class ReleaseRun:
    """One release's run."""

    tracker: Tracker
    run_id: str

    def log(self, *, parameters: Mapping[str, Any] | None = None, metrics: Mapping[str, float] | None = None) -> None:
        """Log parameters and metrics; a parameter that is logged already must have the same value."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        self.tracker.client.log_batch(
            self.run_id,
            metrics=[Metric(k, float(v), now, 0) for k, v in (metrics or {}).items()],
            params=[Param(k, str(v)) for k, v in (parameters or {}).items()],
        )

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Log a file as an artifact."""
        self.tracker.client.log_artifact(self.run_id, str(path), folder)

    def tag(self, name: str, value: str) -> None:
        self.tracker.client.set_tag(self.run_id, name, value)

    def log_release(self, release: Release) -> None:
        """Log what the release is made of: identity, versions and every setting of the recipe, as parameters."""
        settings = dict(_flattened(settings_of(release.recipe)))
        identity = {f"identity.{k}": v[:ID_LENGTH] for k, v in msgspec.to_builtins(release.identity).items()}
        self.log(parameters={**identity, **settings})
        self.tag("lightship.source", str(release.source.path))
        self.tag("lightship.recipe", str(release.recipe_path))
        for name, number in versions().items():
            self.tag(f"version.{name}", number)

    def log_stage(self, stage: StageDone, directory: Path) -> None:
        """Log a finished stage once: its metrics, and its record as an artifact."""
        tag = f"stage.{stage.name}"
        if tag in self.tracker.client.get_run(self.run_id).data.tags:
            return
        prefix = "source/" if stage.name.startswith("source-") else ""
        self.log(metrics={prefix + k: v for k, v in summary.metrics(stage.record).items() if math.isfinite(v)})
        self.log_file(directory / f"{stage.name}.json")
        self.tag(tag, f"{stage.seconds:.1f} s")

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


def _flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flattened(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _flattened(item, f"{prefix}.{number}")
    else:
        yield prefix, value
