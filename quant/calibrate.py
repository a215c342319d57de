"""Run text through the source model and record what each layer's experts see.

From it come the FP8 input scales (one for w1 and w3, one for w2, the same for all experts of a layer), the count of
tokens an expert, and the Hessians that GPTQ rounds against.

    lightship quantize demo/checkpoint OUT --recipe recipes/demo.toml
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from lightship.causal_lm import check_architecture, load_causal_lm, load_tokenizer, routed_experts
from lightship.checkpoint import Checkpoint
from lightship.errors import CheckpointError
from lightship.files import write_json, written_atomically
from lightship.recipe import CalibrationText
from lightship.records import Calibration, LayerCalibration
from lightship.summary import size
from lightship.text import digest_of_text, read_sequences
from lightship.w4afp8 import FP8_MAX

HESSIANS = "hessians.safetensors"
RECORD = "calibration.json"
BATCH_TOKENS = 8192


class LayerObserver:
    """Gathers one layer's statistics; `observe` is the experts' observer. H hidden size, I intermediate size."""

    def __init__(self, experts: int) -> None:
        self.scene = ""
        self.w13_amax = 0.0
        self.w2_amax = 0.0
        self.tokens: dict[str, list[int]] = {}
        self.hessians: dict[str, torch.Tensor] = {}
        self._experts = experts

    def observe(self, expert: int, x_tH: torch.Tensor, h_tI: torch.Tensor) -> None:
        self.w13_amax = max(self.w13_amax, float(x_tH.abs().max()))
        self.w2_amax = max(self.w2_amax, float(h_tI.abs().max()))
        self.tokens.setdefault(self.scene, [0] * self._experts)[expert] += len(x_tH)
        for name, seen in ((f"{expert}.w13", x_tH), (f"{expert}.w2", h_tI)):
            hessian = self.hessians.setdefault(name, torch.zeros(seen.shape[1], seen.shape[1]))
            hessian.addmm_(seen.T, seen)

    def summary(self, layer_name: str) -> LayerCalibration:
        return LayerCalibration(
            layer_name=layer_name,
            w13_amax=self.w13_amax,
            w2_amax=self.w2_amax,
            w13_input_scale=input_scale(self.w13_amax),
            w2_input_scale=input_scale(self.w2_amax),
            expert_tokens=self.tokens,
        )


def input_scale(amax: float) -> float:
    """The least bf16 number that is not below amax / 448, so that no calibrated activation saturates."""
    scale = torch.tensor(amax / FP8_MAX, dtype=torch.float64)
    rounded = scale.bfloat16()
    if rounded.double() < scale:
        rounded = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=torch.bfloat16))
    return float(rounded)


def calibrate(
    source: Path,
    text: CalibrationText,
    out: Path,
    progress: Callable[[Iterable[torch.Tensor], str], Iterable[torch.Tensor]],
) -> Calibration:
    """Calibrate on every scene of `text`; write the Hessians and then the record to the directory `out`.

    Args:
        source: the FP8 checkpoint directory.
        text: scenes, tokens a scene, tokens a sequence.
        out: gets hessians.safetensors (`{layer_name}.{expert}.{w13|w2}`, float32 [in, in]) and calibration.json.
        progress: wraps the batches of a scene, to show how far it is.

    Raises:
        CheckpointError: the source cannot be loaded, or a layer's activations are not finite.
        LightshipError: a scene's text is missing or too short.
    """
    from safetensors.torch import save_file

    start = time.monotonic()
    checkpoint = Checkpoint.open(source)
    check_architecture(checkpoint)
    check_memory(checkpoint, free_memory())
    tokenizer = load_tokenizer(source)
    scenes = {s.scene: read_sequences(s, tokenizer, text.tokens_per_scene, text.sequence_tokens) for s in text.sources}
    model = load_causal_lm(source)
    observers = {}
    for layer_name, experts in routed_experts(model).items():
        observers[layer_name] = LayerObserver(model.config.n_routed_experts)
        experts.observer = observers[layer_name].observe
    with torch.inference_mode():
        for scene, sequences in scenes.items():
            for observer in observers.values():
                observer.scene = scene
            batches = torch.stack(sequences).split(max(1, BATCH_TOKENS // text.sequence_tokens))
            for batch in progress(batches, f"calibrating on {scene}"):
                model(batch, use_cache=False, logits_to_keep=1)
    for layer_name, observer in observers.items():
        if not (torch.tensor([observer.w13_amax, observer.w2_amax]).isfinite().all()):
            raise CheckpointError(
                f"{source}: {layer_name} gives activations that are NaN or infinite; verify the download"
            )
    hessians = {f"{n}.{key}": h for n, observer in observers.items() for key, h in observer.hessians.items()}
    with written_atomically(out / HESSIANS) as partial:
        save_file(hessians, partial)
        partial.chmod(0o644)
    record = Calibration(
        text_digest=digest_of_text(text.sources),
        tokens={scene: sum(len(s) for s in sequences) for scene, sequences in scenes.items()},
        layers=[observer.summary(layer_name) for layer_name, observer in observers.items()],
        seconds=time.monotonic() - start,
    )
    write_json(out / RECORD, record)
    return record


def needed_memory(checkpoint: Checkpoint) -> int:
    """Bytes that calibration holds at once: every weight as stored and as float32, and two Hessians an expert."""
    sizes = checkpoint.dimensions
    elements = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    experts = len(checkpoint.expert_layers()) * sizes.n_routed_experts
    return checkpoint.nbytes + 4 * elements + 4 * experts * (sizes.hidden_size**2 + sizes.moe_intermediate_size**2)


def free_memory() -> int:
    """Bytes that this machine can still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def check_memory(checkpoint: Checkpoint, free: int) -> None:
    """Refuse a model that calibration cannot hold, before hours are spent on loading it.

    Raises:
        CheckpointError: says how much is needed and how much there is.
    """
    needed = needed_memory(checkpoint)
    if needed > free:
        raise CheckpointError(
            f"calibrating {checkpoint.path} needs about {size(needed)} of memory, {size(free)} is free: the whole "
            "model and its statistics are held at once; use a machine with more memory"
        )
