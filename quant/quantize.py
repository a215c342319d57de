"""Checkpoint to W4AFP8 checkpoint in one pass over the weights: calibrate, round, write, an expert at a time.

Block after block, the calibration tokens go through attention and router; then each routed expert is read, rounded on
the tokens that were routed to it, written to its place in the result, and replayed with its rounded weights, so that
the next block sees what the served model will. All else is copied byte for byte (a BF16 source's other linears become
FP8 blocks, which SGLang's method wants). The directory appears under its name when it is whole, manifest included;
until then it is OUT.partial, and the same command goes on from the last finished expert.

    lightship quantize demo/checkpoint OUT --recipe recipes/demo.toml
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import torch

from lightship import __version__
from lightship.causal_lm import load_tokenizer
from lightship.checkpoint import INDEX, MANIFEST, Checkpoint
from lightship.errors import LightshipError
from lightship.files import LOCK, clear_directory, digest_of_file, locked, publish_directory, read_json, write_json
from lightship.manifest import Manifest, describe_files, read_manifest, write_manifest
from lightship.quant.blocks import BATCH_TOKENS, BlockStream, MoEInputs
from lightship.quant.device import choose_device, free_memory, return_freed_memory
from lightship.quant.journal import FINGERPRINT, Journal, check_fingerprint
from lightship.quant.layer import LayerExperts, expert_tensors
from lightship.quant.layout import SHARD_BYTES, Shards, refusing_a_full_disk
from lightship.quant.pipeline import Tensors, Writer, cached_ahead
from lightship.quant.plan import planned_outputs
from lightship.quant.stash import Stash
from lightship.recipe import CalibrationText, Quantization
from lightship.records import Calibration, LayerCalibration, Plan, Quantized
from lightship.release import digest_of_code
from lightship.text import digest_of_text, read_scenes
from lightship.w4afp8 import quantize_fp8_blocks

FORMAT = "w4afp8"
CALIBRATION = "calibration.json"
NOT_COPIED = {"config.json", INDEX, "hf_quant_config.json", CALIBRATION}
RESULT = "checkpoint"
STASH = "stash"
ROUTING = "routing.safetensors"

Progress = Callable[[Iterable[str], str], Iterable[str]]


@dataclass(frozen=True)
class LayerJob:
    """What another process needs to round experts of a layer; `quant.worker` does it."""

    run: str
    """Names the call of `quantize`; what a worker has opened it keeps as long as this is the same."""
    source: Path
    work: Path
    layer_name: str
    number: int
    tokens: int
    settings: Quantization
    device: str
    """Its type, `cpu` or `cuda`: which one is the worker's own matter."""
    dtype: str
    threads: int
    """Of torch. Sums are added in an order that depends on it, so all processes of a run have the same number."""
    shard_bytes: int
    experts: list[int]


Cluster = Callable[[LayerJob], None]
"""Has the job's experts rounded by other processes that see the same directories; returns when they are."""


def quantize(
    checkpoint: Checkpoint,
    plan: Plan,
    text: CalibrationText,
    settings: Quantization,
    out: Path,
    progress: Progress,
    *,
    device: str = "auto",
    stash_memory: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    cluster: Cluster | None = None,
) -> Quantized:
    """Calibrate and quantize `checkpoint` into the new directory `out`, or go on where an earlier call was stopped.

    One that was stopped after it had published `out` has only left OUT.partial behind, which is then tidied up.

    Args:
        progress: wraps the names of the experts, to show how far it is.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        stash_memory: bytes that hidden states may take in memory; beyond it they are files. Half of what is free if
            absent.
        shard_bytes: size of a shard of the result.
        cluster: rounds the experts elsewhere; this process then runs the blocks and the replay.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
        LightshipError: `out` exists, OUT.partial was begun with other inputs, a text is missing or too short, the disk
            is full.
    """
    start = time.monotonic()
    checkpoint.transformers_config()
    where = choose_device(device)
    text_digest = digest_of_text(text.sources)
    fingerprint = _fingerprint(checkpoint, text, text_digest, settings, where, shard_bytes)
    work = work_directory(out)
    if out.exists():
        if not _has_published(work, fingerprint):
            raise LightshipError(f"{out} exists; remove it or name another directory")
        return take_finished(out)
    return_freed_memory()
    tokenizer = load_tokenizer(checkpoint.path)
    scenes = read_scenes(text, tokenizer)
    with refusing_a_full_disk(work), locked(work, wait=False):
        if not (work / RESULT).is_dir() and ((work / FINGERPRINT).is_file() or Journal(work).done):
            # The result of this work was published, and the process ended before it could tidy up, or while it did.
            clear_directory(work)
        check_fingerprint(work, fingerprint)
        run = _Run(checkpoint, plan, settings, text, scenes, work, where, stash_memory, shard_bytes, cluster)
        experts_resumed = run.experts_done
        try:
            layers = run.layers(progress)
        finally:
            run.close()
        calibration = Calibration(
            text_digest=text_digest,
            tokens={scene: sum(len(s) for s in sequences) for scene, sequences in scenes.items()},
            token_floor=settings.token_floor,
            layers=layers,
        )
        manifest_digest = _finish(checkpoint, run.shards, calibration, settings, out)
        _tidy_up(work)
    return Quantized(
        path=str(out),
        method=settings.method,
        manifest_digest=manifest_digest,
        bytes_total=plan.bytes_after,
        experts=sum(len(layer.experts) for layer in layers),
        experts_resumed=experts_resumed,
        seconds=time.monotonic() - start,
    )


def take_finished(out: Path) -> Quantized:
    """The record of a checkpoint that `quantize` has published, for a caller that was stopped before it had it.

    What the stopped process has left of OUT.partial is removed.

    Raises:
        LightshipError: `out` is not such a checkpoint, or a process is working on it.
    """
    manifest = read_manifest(out)
    calibration = read_json(out / CALIBRATION, Calibration)
    experts = sum(len(layer.experts) for layer in calibration.layers)
    if (work := work_directory(out)).is_dir():
        with locked(work, wait=False):
            _tidy_up(work)
    return Quantized(
        path=str(out),
        method=manifest.quantization["method"],
        manifest_digest=digest_of_file(out / MANIFEST),
        bytes_total=Checkpoint.open(out).nbytes,
        experts=experts,
        experts_resumed=experts,
        seconds=0.0,
    )


class _Run:
    """One process at work on OUT.partial. T tokens of the calibration, H hidden size, K experts a token."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        settings: Quantization,
        text: CalibrationText,
        scenes: dict[str, list[torch.Tensor]],
        work: Path,
        device: torch.device,
        stash_memory: int | None,
        shard_bytes: int,
        cluster: Cluster | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.settings = settings
        self.replay_quantized = text.replay == "quantized"
        self.scenes = {scene: sum(len(s) for s in sequences) for scene, sequences in scenes.items()}
        self.ids_BS = torch.stack([s for sequences in scenes.values() for s in sequences])
        self.work = work
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shard_bytes = shard_bytes
        self.cluster = cluster
        self.run = uuid4().hex
        self.journal = Journal(work)
        self.shards = Shards(work / RESULT, list(planned_outputs(plan)), shard_bytes)
        if self.journal.done and (missing := self.shards.missing()):
            raise LightshipError(
                f"{missing[0]} of work that was begun has gone or changed its size; remove {work} to begin anew"
            )
        self.shards.reserve()
        self.reader = checkpoint.reader()
        self.blocks = BlockStream(checkpoint, device, self.dtype)
        hidden = checkpoint.dimensions.hidden_size
        memory = free_memory() // 2 if stash_memory is None else stash_memory
        self.stash = Stash(work / STASH, self.ids_BS.numel(), hidden, self.dtype, memory, device)
        self._left = (-1, torch.empty(0))

    @property
    def experts_done(self) -> int:
        return sum(".experts." in unit for unit in self.journal.done)

    def close(self) -> None:
        self.journal.close()
        self.shards.close()

    def layers(self, progress: Progress) -> list[LayerCalibration]:
        """Go through all blocks that are left; returns the records of all layers with experts."""
        names = [
            f"{layer}.experts.{e}"
            for layer in self.plan.expert_layers
            for e in range(self.checkpoint.dimensions.n_routed_experts)
        ]
        left = [name for name in names if name not in self.journal.done]
        ticks = iter(progress(left, f"quantizing ({self.settings.method})"))
        last = max(Checkpoint.layer_number(layer) for layer in self.plan.expert_layers)
        blocks = max(self.blocks.main_layers, last + 1)
        with Writer(self.shards, self.journal) as writer, torch.inference_mode():
            if "model" not in self.journal.done:
                writer.put("model", self._copied(None))
            for number in range(blocks):
                if _unit(number) not in self.journal.done:
                    self._block(number, number == blocks - 1, writer, lambda: next(ticks, None))
            writer.flush()
        next(ticks, None)
        moe = [_unit(Checkpoint.layer_number(layer)) for layer in self.plan.expert_layers]
        return [self.journal.record(unit, LayerCalibration) for unit in moe]

    def _block(self, number: int, last: bool, writer: Writer, tick: Callable[[], object]) -> None:
        entering_TH = self._entering(number)
        leaving_TH = self.stash.empty(f"hidden-{number + 1}")
        if (beside := _beside_experts(number)) not in self.journal.done:
            writer.put(beside, self._copied(number))
        with self._caching_experts(number):
            inputs = self._forward(number, entering_TH, leaving_TH)
        record, scales = self._experts(number, inputs, leaving_TH, writer, tick) if inputs else (None, [])
        self.stash.remove("moe")
        self._left = number + 1, leaving_TH
        writer.put(
            _unit(number),
            scales,
            record,
            before=lambda: None if last else self.stash.save(f"hidden-{number + 1}", leaving_TH),
            after=lambda: self.stash.remove(f"hidden-{number}"),
        )

    def _caching_experts(self, number: int) -> AbstractContextManager[None]:
        """Meanwhile have the system's page cache read the block's experts, as many as fit into half of free memory."""
        name = f"{_unit(number)}.mlp"
        experts = range(self.checkpoint.dimensions.n_routed_experts if name in self.plan.expert_layers else 0)
        left = [e for e in experts if f"{name}.experts.{e}" not in self.journal.done]
        tensors = [tensor for e in left for tensor in expert_tensors(self.checkpoint, name, e)]
        ends = accumulate(self.checkpoint.info(tensor).nbytes for tensor in tensors)
        room = free_memory() // 2
        return cached_ahead(self.reader.read, [t for t, end in zip(tensors, ends, strict=True) if end <= room])

    def _entering(self, number: int) -> torch.Tensor:
        """Hidden states [T, H] before block `number`: embeddings, or what the block before left."""
        tokens = self.ids_BS.shape[1]
        if number == 0:
            entering_TH = self.stash.empty("hidden-0")
            with self.blocks.embedding() as embed:
                for rows, ids_bS in self._batches(self.ids_BS):
                    entering_TH[rows] = embed(ids_bS.to(self.device)).flatten(0, 1).to(entering_TH.device)
            return entering_TH
        at, left_TH = self._left
        if at != number:
            left_TH = self.stash.load(f"hidden-{number}")
        if number < self.blocks.main_layers:
            return left_TH
        entering_TH = self.stash.empty("mtp")
        next_ids_BS = self.ids_BS.roll(-1, dims=1)
        with (
            self.blocks.embedding() as embed,
            self.blocks.final_norm() as norm,
            self.blocks.mtp_entry(number) as enter,
        ):
            for rows, ids_bS in self._batches(next_ids_BS):
                hidden = left_TH[rows].to(self.device).unflatten(0, (-1, tokens))
                if number == self.blocks.main_layers:
                    hidden = norm(hidden)
                entering_TH[rows] = enter(embed(ids_bS.to(self.device)), hidden).flatten(0, 1).to(entering_TH.device)
        return entering_TH

    def _forward(self, number: int, entering_TH: torch.Tensor, leaving_TH: torch.Tensor) -> MoEInputs | None:
        """Send all tokens through block `number`, without its routed experts; returns what reaches those."""
        seen: list[MoEInputs] = []
        x_TH = torch.empty(0)
        with self.blocks.block(number) as block:
            for rows, ids_bS in self._batches(self.ids_BS):
                out_bSH, inputs = block(entering_TH[rows].to(self.device).unflatten(0, ids_bS.shape))
                leaving_TH[rows] = out_bSH.flatten(0, 1).to(leaving_TH.device)
                if inputs:
                    if not seen:
                        x_TH = self.stash.empty("moe")
                    x_TH[rows] = inputs.x_TH.to(x_TH.device)
                    routing = inputs.experts_TK.to(x_TH.device), inputs.weights_TK.to(x_TH.device)
                    seen.append(MoEInputs(x_TH, *routing))
        if not seen:
            return None
        experts_TK, weights_TK = torch.cat([s.experts_TK for s in seen]), torch.cat([s.weights_TK for s in seen])
        return MoEInputs(x_TH, experts_TK, weights_TK)

    def _experts(
        self, number: int, inputs: MoEInputs, leaving_TH: torch.Tensor, writer: Writer, tick: Callable[[], object]
    ) -> tuple[LayerCalibration, Tensors]:
        """Round and replay the layer's experts and add their share to `leaving_TH`."""
        name = f"{_unit(number)}.mlp"
        experts = LayerExperts(name, number, self.reader, self.shards, self.journal, self.settings, inputs, self.device)
        w13_input = experts.w13_input()
        if self.cluster and experts.left:
            left = experts.left
            self._round_elsewhere(name, number, inputs, left)
            for _ in left:
                tick()
        replayed = experts.replay(writer, self.replay_quantized, tick)
        for rows in _chunks(len(leaving_TH)):
            leaving_TH[rows] += replayed.routed_TH[rows].to(leaving_TH)
        record = LayerCalibration(
            layer_name=name,
            w13_input=w13_input,
            w2_input=replayed.w2_input,
            expert_tokens=experts.tokens_by_scene(self.scenes),
            experts=experts.records(),
        )
        return record, experts.input_scale_tensors(w13_input, replayed.w2_input)

    def _round_elsewhere(self, name: str, number: int, inputs: MoEInputs, left: list[int]) -> None:
        from safetensors.torch import save_file

        assert self.cluster
        self.stash.save("moe", inputs.x_TH)
        routing = {"experts": inputs.experts_TK, "weights": inputs.weights_TK}
        save_file(routing, self.work / STASH / ROUTING)
        self.cluster(
            LayerJob(
                run=self.run,
                source=self.checkpoint.path.absolute(),
                work=self.work.absolute(),
                layer_name=name,
                number=number,
                tokens=len(inputs.x_TH),
                settings=self.settings,
                device=self.device.type,
                dtype=str(self.dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                shard_bytes=self.shard_bytes,
                experts=left,
            )
        )
        self.journal.read()

    def _batches(self, ids_BS: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some sequences at a time: (their rows among all tokens, their ids)."""
        sequences = max(1, BATCH_TOKENS // ids_BS.shape[1])
        for first, ids_bS in enumerate(ids_BS.split(sequences)):
            begin = first * sequences * ids_BS.shape[1]
            yield slice(begin, begin + ids_bS.numel()), ids_bS

    def _copied(self, number: int | None) -> Tensors:
        """The tensors beside the experts of a block (of none: the rest), as the result holds them."""
        for tensor in self.plan.tensors:
            if tensor.action == "int4" or _block_of(tensor.name) != number:
                continue
            value = self.reader.read_finite(tensor.name)
            if tensor.converted:
                q_OI, scale_inv = quantize_fp8_blocks(value)
                yield tensor.name, q_OI
                yield f"{tensor.name}_scale_inv", scale_inv
            else:
                yield tensor.name, value


def work_directory(out: Path) -> Path:
    """Where the work on `out` lies until it is whole."""
    return out.with_name(out.name + ".partial")


def _has_published(work: Path, fingerprint: dict[str, str]) -> bool:
    """Whether this work directory is what a run with these inputs leaves when its result is out."""
    mark = work / FINGERPRINT
    return mark.is_file() and read_json(mark, dict[str, str]) == fingerprint and not (work / RESULT).exists()


def _tidy_up(work: Path) -> None:
    """Remove the work directory, last what tells the same command that its result is out."""
    last = [work / LOCK, work / FINGERPRINT]
    for entry in [*(set(work.iterdir()) - set(last)), *last]:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    work.rmdir()


def quantization_config() -> dict[str, Any]:
    """The block of config.json. SGLang reads `quant_method` alone; the rest is for people and other loaders."""
    return {
        "quant_method": FORMAT,
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "moe_weight_bits": 4,
        "moe_group_size": 128,
        "moe_activation_scheme": "static",
    }


def _finish(checkpoint: Checkpoint, shards: Shards, calibration: Calibration, settings: Quantization, out: Path) -> str:
    """Write what belongs to a finished checkpoint, the manifest last, and give the directory its name."""
    result = shards.directory
    for left in result.iterdir():
        # A process that was killed here may have left a file under its temporary name.
        if left.name not in shards.names:
            left.unlink()
    shards.write_index()
    for companion in checkpoint.companions():
        if companion.name not in NOT_COPIED:
            shutil.copyfile(companion, result / companion.name)
    config = dict(checkpoint.config, quantization_config=quantization_config())
    (result / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_json(result / CALIBRATION, calibration)
    manifest_digest = write_manifest(
        result,
        Manifest(
            format=FORMAT,
            lightship=__version__,
            source_digest=checkpoint.digest,
            calibration_text_digest=calibration.text_digest,
            quantization=msgspec.to_builtins(settings),
            experts_without_tokens=calibration.without_tokens,
            files=describe_files(result),
        ),
    )
    publish_directory(result, out)
    return manifest_digest


def _fingerprint(
    checkpoint: Checkpoint,
    text: CalibrationText,
    text_digest: str,
    settings: Quantization,
    device: torch.device,
    shard_bytes: int,
) -> dict[str, str]:
    """All that decides the result's bytes, by names that an error can say."""
    calibration = {k: v for k, v in msgspec.to_builtins(text).items() if k != "sources"}
    return {
        **{f"source {name}": value for name, value in checkpoint.fingerprint().items()},
        **{
            f"recipe quantization.{k}": msgspec.json.encode(v).decode()
            for k, v in msgspec.to_builtins(settings).items()
        },
        **{f"recipe calibration.{k}": msgspec.json.encode(v).decode() for k, v in calibration.items()},
        "calibration text": text_digest,
        "shard size": str(shard_bytes),
        **fingerprint_of_process(device),
    }


def fingerprint_of_process(device: torch.device) -> dict[str, str]:
    """What of a process decides the result's bytes; all that work on a result have the same."""
    process = {
        "device": device.type,
        "lightship's code": digest_of_code(("lightship", "lightship.quant")),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    if device.type == "cpu":
        # Sums are added in an order that depends on it.
        process["torch's threads"] = str(torch.get_num_threads())
    return process


def _unit(number: int) -> str:
    return f"model.layers.{number}"


def _beside_experts(number: int) -> str:
    return f"{_unit(number)} beside its experts"


def _block_of(name: str) -> int | None:
    """The number of the block to which a tensor belongs."""
    return Checkpoint.layer_number(name) if ".layers." in name else None


def _chunks(rows: int) -> Iterator[slice]:
    for first in range(0, rows, BATCH_TOKENS):
        yield slice(first, first + BATCH_TOKENS)
