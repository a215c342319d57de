"""Round some experts of a layer in another process than the one that runs the blocks, perhaps on another machine.

Both see the source and the work directory by the same paths. What a worker has finished is in the journal, so one that
is killed loses the expert it was at.
"""

import os
from functools import lru_cache
from pathlib import Path

import torch

from lightship.checkpoint import Checkpoint
from lightship.quant.blocks import MoEInputs
from lightship.quant.device import choose_device
from lightship.quant.journal import Journal
from lightship.quant.layer import LayerExperts
from lightship.quant.layout import Shards
from lightship.quant.pipeline import Writer
from lightship.quant.plan import plan_quantization, planned_outputs
from lightship.quant.quantize import RESULT, ROUTING, STASH, LayerJob
from lightship.quant.stash import Stash


def round_experts(job: LayerJob, worker: int = 0) -> int:
    """Round the job's experts that the journal does not name yet; returns how many that were.

    Args:
        worker: this worker's number; with several GPUs, it takes the one of that number.
    """
    from safetensors.torch import load_file

    device = choose_device()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", worker % torch.cuda.device_count())
    checkpoint, shards = _opened(job.source, job.work, job.shard_bytes, os.getpid())
    routing = load_file(job.work / STASH / ROUTING)
    stash = Stash(job.work / STASH, job.tokens, checkpoint.dimensions.hidden_size, getattr(torch, job.dtype), memory=0)
    inputs = MoEInputs(stash.load("moe"), routing["experts"], routing["weights"])
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
    return len(todo)


@lru_cache(maxsize=1)
def _opened(source: Path, work: Path, shard_bytes: int, process: int) -> tuple[Checkpoint, Shards]:  # noqa: ARG001
    checkpoint = Checkpoint.open(source)
    return checkpoint, Shards(work / RESULT, list(planned_outputs(plan_quantization(checkpoint))), shard_bytes)
