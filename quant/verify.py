"""Audit any W4AFP8 checkpoint, ours or not: would SGLang serve it, and is it the model that it was made from?

SGLang takes a missing input scale for 1.0, unpacks swapped nibbles and misaligned shards as they come, and serves
nonsense without an error; each of these is a check here.

    lightship verify OUT --against demo/checkpoint
"""

from dataclasses import replace
from pathlib import Path

from lightship.checkpoint import MANIFEST, Checkpoint
from lightship.errors import CheckpointError, LightshipError
from lightship.manifest import check_files
from lightship.quant.expert_weights import ExpertsPass
from lightship.quant.findings import Findings
from lightship.quant.input_scales import check_input_scales
from lightship.quant.loadable import check_config, check_experts, check_linears, check_mtp, check_tensor_parallel
from lightship.quant.other_tensors import check_others
from lightship.records import Check, Verification


def verify(path: Path, source: Path | None = None) -> Verification:
    """Verify the checkpoint directory `path`, against the FP8 or BF16 `source` it was made from if given.

    Never raises for a fault of the checkpoint: every fault is a failed check that names the tensor or file.

    Raises:
        CheckpointError: the source cannot be read, or is another model.
    """
    against = str(source) if source else None
    original = Checkpoint.open(source) if source else None
    opens = Findings("opens")
    try:
        checkpoint = Checkpoint.open(path)
        sizes = checkpoint.dimensions
    except LightshipError as error:
        opens.fail(str(error))
        return Verification(path=str(path), source=against, checks=[opens.check("")], layers=[])
    # The MTP layers may have been left out.
    if original and replace(original.dimensions, mtp_layers=sizes.mtp_layers) != sizes:
        raise CheckpointError(f"{source} is not the source of {path}: {original.dimensions} is not {sizes}")
    ours = (path / MANIFEST).is_file()
    layers = list(checkpoint.expert_layers())
    finite, exact = Findings("finite"), Findings("exact in bf16")
    checks = [
        opens.check(f"{len(checkpoint.tensors):,} tensors in {len(checkpoint.shards)} files, all indexed"),
        check_manifest(path),
        check_config(checkpoint),
        check_experts(checkpoint),
        check_mtp(checkpoint),
        check_tensor_parallel(checkpoint),
        check_linears(checkpoint),
        *check_input_scales(checkpoint, layers, exact, ours=ours),
    ]
    experts = ExpertsPass(checkpoint, original, finite, exact, ours)
    experts.run(layers)
    untouched = check_others(checkpoint, original, finite)
    checks += [finite.check("no NaN, no infinity"), exact.check("the loader's cast to bf16 changes no scale")]
    checks += [untouched] if untouched else []
    return Verification(path=str(path), source=against, checks=checks + experts.checks(), layers=experts.layers)


def check_manifest(path: Path) -> Check:
    """Whether each file is as lightship wrote it; a directory of another tool has no manifest to compare with."""
    found = Findings("manifest")
    if not (path / MANIFEST).is_file():
        found.warn("no lightship manifest: written by another tool")
    else:
        try:
            check_files(path)
        except LightshipError as error:
            found.fail(str(error))
    return found.check("every file as it was written")
