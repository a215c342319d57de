"""Round some experts of a layer in another process than the one that runs the blocks, perhaps on another machine.

Both see the source and the work directory by the same paths. What a worker has finished is in the journal within a
second or so, and one that is killed loses no more than that. The bits are those of a run in one process: a worker of
another device type, torch or lightship is refused, and torch gets the thread count of the process that runs the blocks,
which on CPUs decides the order in which sums are added.
"""

import os
from functools import lru_cache
from pathlib import Path

import torch

from lightship.checkpoint import Checkpoint
from lightship.errors import LightshipError
from lightship.files import read_json
from lightship.quant.blocks import MoEInputs
from lightship.quant.device import DEVICE, choose_device
from lightship.quant.journal import FINGERPRINT, Journal
from lightship.quant.layer import LayerExperts
from lightship.quant.layout import Shards
from lightship.quant.pipeline import Writer
from lightship.quant.plan import plan_quantization, planned_outputs
from lightship.quant.quantize import RESULT, ROUTING, STASH, LayerJob, fingerprint_of_process
from lightship.quant.stash import Stash


def round_experts(job: LayerJob, worker: int = 0) -> int:
    """Round the job's experts that the journal does not name yet; returns how many that were.

    Args:
        worker: this worker's number; with several GPUs, it takes the one of that number, unless LIGHTSHIP_DEVICE names
            its device.

    Raises:
        LightshipError: as `lightship.quant.quantize`; or this process cannot work on that result.
    """
    from safetensors.torch import load_file

    device = _device(job.device, worker)
    torch.set_num_threads(job.threads)
    checkpoint, shards = _opened(job.run, job.source, job.work, job.shard_bytes, device)
    routing = load_file(job.work / STASH / ROUTING)
    hidden = checkpoint.dimensions.hidden_size
    stash = Stash(job.work / STASH, job.tokens, hidden, getattr(torch, job.dtype), memory=0, device=device)
    x_TH = stash.load("moe")
    inputs = MoEInputs(x_TH, routing["experts"].to(x_TH.device), routing["weights"].to(x_TH.device))
    journal = Journal(job.work)
    try:
        experts = LayerExperts(
            job.layer_name, job.number, checkpoint.reader(), shards, journal, job.settings, inputs, device
        )
        todo = sorted(set(experts.left) & set(job.experts))
        with Writer(shards, journal) as writer, torch.inference_mode():
            experts.round(todo, writer, lambda: None)
            writer.flush()
    finally:
        journal.close()
        # Files that stay open would take what a later run of that name writes.
        shards.close()
    return len(todo)


def _device(kind: str, worker: int) -> torch.device:
    if kind == "cuda" and not os.environ.get(DEVICE) and torch.cuda.is_available():
        return torch.device("cuda", worker % torch.cuda.device_count())
    return choose_device("auto" if os.environ.get(DEVICE) else kind)


@lru_cache(maxsize=1)
def _opened(
    run: str,  # noqa: ARG001
    source: Path,
    work: Path,
    shard_bytes: int,
    device: torch.device,
) -> tuple[Checkpoint, Shards]:
    """What all jobs of a run share, after a look at whether this process may work on it."""
    checkpoint = Checkpoint.open(source)
    here = {f"source {name}": digest for name, digest in checkpoint.fingerprint().items()}
    here |= fingerprint_of_process(device)
    begun = read_json(work / FINGERPRINT, dict[str, str])
    for what, value in here.items():
        if begun.get(what) != value:
            raise LightshipError(
                f"the worker {os.uname().nodename} ({os.getpid()}) has another {what} than the run: {value}, not "
                f"{begun.get(what)}; give all workers the same, and start them anew"
            )
    return checkpoint, Shards(work / RESULT, list(planned_outputs(plan_quantization(checkpoint))), shard_bytes)
