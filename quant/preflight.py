"""Before the work: can this checkpoint be quantized on this machine, what comes out, how long does it take?

Of the checkpoint it reads the headers only, except for the probe, which reads shards for some seconds and rounds one
expert. The calibration text is read as the quantization will read it, since a scene may hold less than it is asked
for.

    lightship plan demo/checkpoint --recipe recipes/demo.toml --out-dir OUT
"""

import shutil
from pathlib import Path

import msgspec
import torch

from lightship.causal_lm import load_tokenizer
from lightship.census import Census, census
from lightship.checkpoint import Checkpoint
from lightship.files import PARTIAL
from lightship.quant.capacity import active_parameters, fits_of, gb, peak_memory
from lightship.quant.degrees import degrees_of
from lightship.quant.device import choose_device, free_memory
from lightship.quant.journal import Journal
from lightship.quant.plan import plan_quantization
from lightship.quant.probe import measure
from lightship.recipe import CalibrationText, Quantization
from lightship.records import Duration, Need, Part, Plan, Preflight, Probe
from lightship.text import read_scenes

ASSUMED_TOKENS = 131_072
"""Of calibration text, if there is no recipe."""
PROBE_SECONDS = 30.0
GPU_HOUR = 2.50
NAMED = 20
"""Unexpected tensors that the record names."""


def preflight(
    checkpoint: Checkpoint,
    settings: Quantization,
    text: CalibrationText | None = None,
    out: Path | None = None,
    *,
    gpu_hour: float = GPU_HOUR,
    probe_seconds: float = PROBE_SECONDS,
    device: str = "auto",
    tensors: bool = False,
) -> Preflight:
    """Look at checkpoint, recipe and machine before the work.

    Args:
        text: the recipe's calibration; `ASSUMED_TOKENS` if absent.
        out: where the result is to be written; the disk below it is judged, and what is done there is counted.
        gpu_hour: price of an hour of the device.
        probe_seconds: 0 measures nothing, and gives no time.
        tensors: list every tensor in the record.

    Raises:
        CheckpointError: the checkpoint is incomplete, not a MoE model, or of an unknown family or format.
        LightshipError: the calibration text is missing or too short.
    """
    plan = plan_quantization(checkpoint)
    taken = census(checkpoint)
    where = choose_device(device)
    by_scene = _tokens_of(checkpoint, text) if text else {}
    tokens = sum(by_scene.values()) if text else ASSUMED_TOKENS
    experts = len(plan.expert_layers) * checkpoint.dimensions.n_routed_experts
    done = min(_experts_done(out), experts) if out else 0
    on_gpu = where.type == "cuda"
    device_need, host_need, stash = peak_memory(checkpoint, taken, settings, tokens, on_gpu=on_gpu)
    free = free_memory()
    needs = [msgspec.structs.replace(host_need, available=free)]
    if on_gpu:
        needs.append(msgspec.structs.replace(device_need, available=torch.cuda.mem_get_info(where)[0]))
    if out:
        needs.append(_disk(plan, out, stash, in_memory=stash <= free // 2))
    measured = durations = None
    if probe_seconds:
        an_expert = max(1, tokens * checkpoint.dimensions.num_experts_per_tok // checkpoint.dimensions.n_routed_experts)
        measured = measure(checkpoint, settings, an_expert, where, probe_seconds)
        durations = _durations(plan, measured, experts, tokens, active_parameters(checkpoint, taken))
    seconds = _total(durations) * (experts - done) / experts if durations else None
    return Preflight(
        source=str(checkpoint.path),
        model_type=str(checkpoint.config["model_type"]),
        tensors=len(plan.tensors),
        unexpected=taken.unexpected[:NAMED],
        mtp_declared=taken.mtp_declared,
        mtp_found=taken.mtp_found,
        parts=_parts(plan),
        degrees=degrees_of(taken.expected.values()),
        fits=fits_of(checkpoint, plan, taken),
        calibration_tokens=by_scene,
        needs=needs,
        probe=measured,
        durations=durations or [],
        seconds=seconds,
        price=seconds / 3600 * gpu_hour if seconds is not None else None,
        gpu_hour=gpu_hour,
        experts=experts,
        experts_done=done,
        problems=[_problem(need) for need in needs if not need.enough],
        notes=_notes(plan, taken) + _text_notes(text, by_scene),
        planned=plan.tensors if tensors else [],
    )


def _parts(plan: Plan) -> list[Part]:
    """By part of the model, the largest first."""
    parts: dict[str, Part] = {}
    for t in plan.tensors:
        part = parts.get(t.part) or Part(part=t.part, tensors=0, bytes_before=0, bytes_after=0)
        parts[t.part] = Part(
            part=t.part,
            tensors=part.tensors + 1,
            bytes_before=part.bytes_before + t.bytes_before,
            bytes_after=part.bytes_after + t.bytes_after,
        )
    return sorted(parts.values(), key=lambda part: -part.bytes_before)


def _experts_done(out: Path) -> int:
    """Experts that an earlier run has finished in OUT.partial."""
    return sum(".experts." in unit for unit in Journal(out.with_name(out.name + PARTIAL)).done)


def _disk(plan: Plan, out: Path, stash: int, *, in_memory: bool) -> Need:
    """Room for the result and the stash; with the stash in memory, one of its four tensors is on disk all the same."""
    work = out.with_name(out.name + PARTIAL)
    begun = sum(p.stat().st_blocks * 512 for p in work.rglob("*") if p.is_file()) if work.is_dir() else 0
    on_disk = stash // 4 if in_memory else stash
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    return Need(
        what=f"disk at {place}",
        needed=max(plan.bytes_after + on_disk - begun, 0),
        available=shutil.disk_usage(place).free,
        arithmetic=f"result {gb(plan.bytes_after)} + hidden states {gb(on_disk)}"
        + (f" - {gb(begun)} there already" if begun else ""),
    )


def _durations(plan: Plan, probe: Probe, experts: int, tokens: int, active: int) -> list[Duration]:
    def at(what: str, nbytes: int) -> Duration:
        seconds = nbytes / probe.read_bandwidth
        return Duration(what=what, seconds=seconds, arithmetic=f"{gb(nbytes)} / {probe.read_bandwidth / 1e9:.2f} GB/s")

    work = 2.0 * active * tokens
    return [
        at("read", plan.bytes_before),
        at("write, taken to be as fast", plan.bytes_after),
        Duration(
            what="round",
            seconds=experts * probe.expert_seconds,
            arithmetic=f"{experts:,} experts x {probe.expert_seconds:.2f} s",
        ),
        Duration(
            what="forward",
            seconds=work / probe.flops,
            arithmetic=f"2 x {active / 1e9:.1f} G active weights x {tokens:,} tokens / "
            f"{probe.flops / 1e12:.2f} TFLOP/s",
        ),
    ]


def _total(durations: list[Duration]) -> float:
    """Reading and writing share the disk, rounding and forward the device, and the two go on at the same time."""
    read, write, rounding, forward = (duration.seconds for duration in durations)
    return max(read + write, rounding + forward)


def _problem(need: Need) -> str:
    advice = {
        "memory": "calibrate with fewer tokens, or use a machine with more memory",
        "GPU memory": "use a GPU with more memory, or round on the CPU with LIGHTSHIP_DEVICE=cpu",
    }.get(need.what, "free some, or name a directory on another disk")
    return f"{need.what}: needs {gb(need.needed)} ({need.arithmetic}), {gb(need.available)} is there: {advice}"


def _tokens_of(checkpoint: Checkpoint, text: CalibrationText) -> dict[str, int]:
    """Scene -> tokens of its sequences."""
    scenes = read_scenes(text, load_tokenizer(checkpoint.path))
    return {scene: sum(len(ids_S) for ids_S in sequences) for scene, sequences in scenes.items()}


def _text_notes(text: CalibrationText | None, by_scene: dict[str, int]) -> list[str]:
    if text is None:
        return [f"without --recipe: method gptq and {ASSUMED_TOKENS:,} calibration tokens are assumed"]
    asked: dict[str, int] = {}
    for source in text.sources:
        sequences = source.share(text.tokens_per_scene) // text.sequence_tokens
        asked[source.scene] = asked.get(source.scene, 0) + sequences * text.sequence_tokens
    short = [f"{scene} {given:,} of {asked[scene]:,}" for scene, given in by_scene.items() if given < asked[scene]]
    if not short:
        return []
    return [
        f"the calibration text gives {sum(by_scene.values()):,} of the {sum(asked.values()):,} tokens that the recipe "
        f"asks for, and is used as it is: {', '.join(short)}; add text for more"
    ]


def _notes(plan: Plan, taken: Census) -> list[str]:
    notes = []
    if unexpected := taken.unexpected:
        notes.append(
            f"{len(unexpected)} tensors are not in the architecture's declaration and are kept as they are: "
            f"{', '.join(unexpected[:3])}{', …' if len(unexpected) > 3 else ''}"
        )
    if taken.mtp_found < taken.mtp_declared:
        notes.append(
            f"config.json declares {taken.mtp_declared} MTP layers, the release holds {taken.mtp_found}: a server "
            "cannot draft with them"
        )
    if converted := [t for t in plan.tensors if t.converted]:
        notes.append(
            f"{len(converted)} linears beside the experts are in {converted[0].dtype} and become FP8 128x128 blocks, "
            "which SGLang's W4AFP8 reads"
        )
    return notes
