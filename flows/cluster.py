"""Quantize as the recipe asks: in this process, or with the experts on a Dask cluster, through prefect-dask.

A worker is a process with a device of its own, here or on another machine that sees the same directories. What it has
finished is in the journal of the work directory; the task of a worker that is killed goes to another and does what is
left of it.
"""

from collections.abc import Sequence
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait

from lightship.checkpoint import Checkpoint
from lightship.errors import LightshipError
from lightship.progress import tracked
from lightship.quant import quantize as quantizer
from lightship.quant.quantize import LayerJob
from lightship.recipe import Cluster, Recipe
from lightship.records import Plan, Quantized

RETRIES = 3


def quantize(source: Checkpoint, plan: Plan, recipe: Recipe, out: Path, device: str = "auto") -> Quantized:
    """`lightship.quant.quantize` by the recipe, on its cluster if it names one.

    Raises:
        LightshipError: as `lightship.quant.quantize`; or prefect-dask is not installed.
    """
    if recipe.cluster is None:
        return quantizer.quantize(source, plan, recipe.calibration, recipe.quantization, out, tracked, device=device)
    return quantize_on_cluster(source, plan, recipe, out, device)


def quantize_on_cluster(source: Checkpoint, plan: Plan, recipe: Recipe, out: Path, device: str = "auto") -> Quantized:
    """`lightship.quant.quantize` with the experts on the recipe's cluster.

    Raises:
        LightshipError: as `lightship.quant.quantize`; or prefect-dask is not installed.
    """
    assert recipe.cluster
    return _quantize.with_options(task_runner=_task_runner(recipe.cluster))(source, plan, recipe, out, device)


@flow(name="quantize", validate_parameters=False)
def _quantize(source: Checkpoint, plan: Plan, recipe: Recipe, out: Path, device: str) -> Quantized:
    """Run the blocks here and round their experts as tasks of this flow's runner."""

    def on_workers(jobs: Sequence[LayerJob]) -> None:
        futures = [round_experts.submit(job) for job in jobs]
        wait(futures)
        for future in futures:
            future.result()

    return quantizer.quantize(
        source, plan, recipe.calibration, recipe.quantization, out, tracked, device=device, cluster=on_workers
    )


@task(cache_policy=NO_CACHE, retries=RETRIES, task_run_name="{job.layer_name} {job.experts}")
def round_experts(job: LayerJob) -> int:
    from distributed import get_worker

    from lightship.quant.worker import round_experts

    name = get_worker().name
    return round_experts(job, name if isinstance(name, int) else 0)


def _task_runner(cluster: Cluster) -> object:
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError:
        raise LightshipError(
            "the recipe asks for a cluster, which needs prefect-dask: pip install 'lightship[cluster]'"
        ) from None
    if cluster.scheduler:
        return DaskTaskRunner(address=cluster.scheduler)
    return DaskTaskRunner(cluster_kwargs={"n_workers": cluster.workers, "threads_per_worker": 1, "processes": True})
