"""Saying what is served: a line in the log, a gauge in SGLang's /metrics, and a block in its /server_info."""

import logging
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from lightship import __version__
from lightship.serving.sglang_plugin.settings import Settings

GAUGE = "lightship_moe_active"
STATE_KEY = "lightship_moe"

logger = logging.getLogger(__name__)


@dataclass
class Activity:
    """This process's W4AFP8 layers: those that lightship runs, and those that it left to SGLang, with the reasons."""

    version: str = __version__
    activations: str = ""
    tuning: str = ""
    created: int = 0
    layers: int = 0
    left: list[str] = field(default_factory=list)


_activity = Activity()


def create() -> None:
    """A layer has been taken over; its weights are still to come."""
    _activity.created += 1


def leave(reason: str) -> None:
    """A layer stays with SGLang; each reason is logged once."""
    if reason not in _activity.left:
        _activity.left.append(reason)
        logger.warning("lightship leaves W4AFP8 experts to SGLang: %s", reason)


def serve(settings: Settings, tuning: str, *, first_rank: bool) -> None:
    """A layer is loaded. After a model's last one, say so: once in the first rank's log, and in every rank's gauge."""
    _activity.activations, _activity.tuning = settings.activations, tuning
    _activity.layers += 1
    if _activity.layers < _activity.created:
        return
    if first_rank:
        logger.info(
            "lightship %s runs the W4AFP8 experts of %d layers: activations %s, tuning %s",
            _activity.version,
            _activity.layers,
            _activity.activations,
            tuning,
        )
    _set_gauge()


def add_to_state(result: Any, *_: Any, **__: Any) -> None:
    """After `Scheduler.get_internal_state`: add what this plugin does, which /server_info shows."""
    state = asdict(_activity)
    del state["created"]
    result.internal_state[STATE_KEY] = state


def _set_gauge() -> None:
    # SGLang sets the directory when --enable-metrics is given, before it starts the scheduler; prometheus_client must
    # not be imported without it.
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        _gauge().labels(_activity.version, _activity.activations, _activity.tuning).set(_activity.layers)


def _gauge() -> Any:
    global _created_gauge
    if _created_gauge is None:
        from prometheus_client import Gauge

        _created_gauge = Gauge(
            GAUGE,
            "Layers whose W4AFP8 experts lightship runs, on the rank that has fewest.",
            ["version", "activations", "tuning"],
            multiprocess_mode="min",
        )
    return _created_gauge


_created_gauge: Any = None
