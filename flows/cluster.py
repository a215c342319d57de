"""Quantize as the recipe asks: in this process, or with the experts on a Dask cluster, through prefect-dask.

A worker is a process with a device of its own, here or on another machine that sees the same directories. This process
runs the blocks and the replay; a flow a layer has the experts rounded. What a worker has finished is in the journal of
the work directory; Dask gives the task of a worker that is killed to another, which does what is left of it.
"""

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from lightship.checkpoint import Checkpoint
from lightship.errors import LightshipError
from lightship.flows import needing_cluster_packages
from lightship.progress import tracked
from lightship.quant import quantize as quantizer
from lightship.quant.quantize import LayerJob
from lightship.recipe import Cluster, Recipe
from lightship.records import Plan, Quantized

T = TypeVar("T")
EXPERTS_A_TASK = 4
CONNECT_SECONDS = 30
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def quantize(
    source: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    out: Path,
    device: str = "auto",
    stash_memory: int | None = None,
) -> Quantized:
    """`lightship.quant.quantize` by the recipe, on its cluster if it names one.

    Raises:
        LightshipError: as `lightship.quant.quantize`; prefect-dask is not installed, the scheduler does not answer or
            has no workers, or the same experts have ended one worker after another.
    """
    run = partial(
        quantizer.quantize,
        source,
        plan,
        recipe.calibration,
        recipe.quantization,
        out,
        tracked,
        device=device,
        stash_memory=stash_memory,
    )
    if recipe.cluster is None:
        return run()
    with _workers(recipe.cluster) as scheduler:
        # A context of its own: Prefect would send the parameters of the flow and task around it to every worker.
        return run(cluster=lambda job: Context().run(_round_layer, job, scheduler))


@flow(name="round layer", flow_run_name="{job.layer_name}", validate_parameters=False)
def round_layer(job: LayerJob) -> None:
    """Round the job's experts, a few a task."""
    parts = [job.experts[first : first + EXPERTS_A_TASK] for first in range(0, len(job.experts), EXPERTS_A_TASK)]
    for future in [round_experts.submit(replace(job, experts=part)) for part in parts]:
        future.result()


@task(cache_policy=NO_CACHE, task_run_name="{job.layer_name} {job.experts}")
def round_experts(job: LayerJob) -> int:
    """On a worker: round the job's experts that are left; returns how many that were."""
    from distributed import get_worker

    from lightship.quant import worker

    name = get_worker().name
    return worker.round_experts(job, name if isinstance(name, int) else 0)


def _round_layer(job: LayerJob, scheduler: str) -> None:
    from distributed.scheduler import KilledWorker
    from prefect_dask import DaskTaskRunner

    # Workers report to the server of this process, else each would start one of its own.
    with temporary_settings({PREFECT_API_URL: str(get_client(sync_client=True).api_url)}):
        try:
            round_layer.with_options(task_runner=DaskTaskRunner(address=scheduler))(job)
        except KilledWorker as error:
            raise LightshipError(
                f"experts of {job.layer_name} have ended worker after worker, for want of memory perhaps: {error}; "
                "see the workers' logs and run the same command again, which goes on from the last finished expert"
            ) from error


def _deaf_to_interrupts(start: Callable[[], T]) -> T:
    """Call `start`, with SIGINT blocked in whatever threads and processes it starts.

    A terminal sends Ctrl-C to all processes: this one ends its workers, which have nothing to say about it.
    """

    def blocked() -> T:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        return start()

    # Its start unblocks the signal in the thread that needs it first.
    resource_tracker.ensure_running()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(blocked).result()


@contextlib.contextmanager
def _workers(cluster: Cluster) -> Iterator[str]:
    """The address of a scheduler with workers; those that the recipe has us start end with this context."""
    with needing_cluster_packages():
        import prefect_dask  # noqa: F401
        from distributed import Client, LocalCluster
    # Dask sets this level when it is imported, and Prefect shows what propagates.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if cluster.workers:
        start = partial(
            LocalCluster,
            n_workers=cluster.workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            memory_limit=None,
            env=WORKER_ENVIRONMENT,
        )
        with _deaf_to_interrupts(start) as local:
            yield local.scheduler_address
        return
    assert cluster.scheduler
    try:
        with Client(cluster.scheduler, timeout=CONNECT_SECONDS, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise LightshipError(
            f"the recipe's cluster.scheduler {cluster.scheduler} cannot be used: {error}; start `dask scheduler`, and "
            f"`dask worker {cluster.scheduler}` for each device"
        ) from error
    yield cluster.scheduler
