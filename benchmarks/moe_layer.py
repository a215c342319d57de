"""A MoE layer at DeepSeek-V3's true shape on one GPU: how long it takes to calibrate, round and write it.

A DeepSeek-V3 of two layers (256 experts of 7168 x 2048 each, real attention, FP8 blocks) with random weights is written
to disk and quantized by `lightship.quant.quantize`, once by `mse` and once by `gptq`, from a cold page cache, with the
disk's bandwidth measured before and after each. A layer's seconds are half of the two's: of two, because a layer's last
writes overlap with the next one's attention. Writes benchmarks/moe_layer.json.

    python -m benchmarks.moe_layer DIR        DIR: 50 GB free, on the disk to measure
"""

import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lightship.checkpoint import INDEX, Checkpoint
from lightship.files import read_json, write_json
from lightship.quant.gptq import round_gptq
from lightship.quant.layout import bytes_of
from lightship.quant.mse import round_mse
from lightship.quant.plan import plan_quantization
from lightship.quant.quantize import CALIBRATION, quantize
from lightship.recipe import CalibrationText, Quantization, TextSource
from lightship.records import Calibration
from lightship.w4afp8 import quantize_fp8_blocks

ROOT = Path(__file__).parents[1]
COMMAND = "python -m benchmarks.moe_layer DIR"
LAYERS = 2
MOE_LAYERS = 58
PEER_GPU_HOURS = 16
"""MoE-Quant on DeepSeek-R1, published: two hours on eight H100."""
SEQUENCES, SEQUENCE_TOKENS = 256, 512
READ_BYTES = 4 << 30
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "moe_layer_freq": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
}


def main() -> None:
    """Measure and write the result file."""
    folder = Path(sys.argv[1])
    source = folder / "source"
    if not (source / INDEX).is_file():
        # In a process of its own, whose memory is not counted with quantize's.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(write_source, source, CONFIG).result()
    checkpoint = Checkpoint.open(source)
    text = write_text(folder, CONFIG["vocab_size"], SEQUENCES, SEQUENCE_TOKENS)
    pcie = pcie_bandwidth()
    result: dict[str, Any] = {
        "command": COMMAND,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "cpus": os.cpu_count(),
        "layers": LAYERS,
        "source_bytes": checkpoint.nbytes,
        "calibration_tokens": SEQUENCES * SEQUENCE_TOKENS,
        "disk_read_gb_s": round(read_bandwidth(checkpoint) / 1e9, 2),
        "pcie_gb_s": round(pcie / 1e9, 2),
    }
    print(json.dumps(result, indent=1), flush=True)
    compile_kernels()
    moved = checkpoint.nbytes + plan_quantization(checkpoint).bytes_after
    mixed = [read_and_write_bandwidth(checkpoint, folder)]
    for method in ("mse", "gptq"):
        measured = quantize_once(checkpoint, text, Quantization(method=method), folder / method)
        shutil.rmtree(folder / method)
        mixed.append(read_and_write_bandwidth(checkpoint, folder))
        slower = min(sum(mixed[-2:]) / 2, pcie)
        rate = moved / LAYERS / measured["layer_seconds"]
        measured["disk_read_and_write_gb_s_before_and_after"] = [round(b / 1e9, 2) for b in mixed[-2:]]
        measured["read_and_written_gb_s"] = round(rate / 1e9, 2)
        measured["of_the_slower_bandwidth"] = round(rate / slower, 3)
        measured["model_gpu_hours"] = round(MOE_LAYERS * measured["layer_seconds"] / 3600, 2)
        result[method] = measured
        print(method, json.dumps(measured), flush=True)
    result["arithmetic"] = (
        f"model_gpu_hours = {MOE_LAYERS} MoE layers x layer_seconds / 3600; MoE-Quant's published figure is "
        f"{PEER_GPU_HOURS} GPU-hours; of_the_slower_bandwidth = (source + result) / layers / layer_seconds over the "
        "smaller of PCIe and the mean of the disk's two bandwidths"
    )
    write_json(Path(os.environ.get("OUT", ROOT / "benchmarks")) / "moe_layer.json", result)


def compile_kernels() -> None:
    """A process does it once, not once a layer: keep it out of the layers' time."""
    w_OI = torch.randn(256, 256, device="cuda")
    round_mse(w_OI)
    round_gptq(w_OI, torch.eye(256, device="cuda"), damping=0.01, sweeps=2)


class Clock:
    """A progress callback that notes when the first layer begins, when each expert is rounded, and when all is done."""

    def __init__(self) -> None:
        self.begin = self.end = 0.0
        self.experts: list[float] = []

    def __call__(self, items: Any, what: str) -> Any:  # noqa: ARG002
        self.begin = time.perf_counter()
        return self._noted(items)

    def _noted(self, items: Any) -> Any:
        for item in items:
            self.experts.append(time.perf_counter() - self.begin)
            yield item
        self.end = time.perf_counter()


def quantize_once(checkpoint: Checkpoint, text: CalibrationText, settings: Quantization, out: Path) -> dict[str, Any]:
    """Quantize into `out` from a cold page cache: how long a layer and the whole took, and the peaks of memory."""
    drop_page_cache(checkpoint)
    torch.cuda.reset_peak_memory_stats()
    clock, resident = Clock(), PeakMemory()
    start = time.perf_counter()
    with resident:
        quantize(checkpoint, plan_quantization(checkpoint), text, settings, out, clock, device="cuda")
    seconds = time.perf_counter() - start
    layers = read_json(out / CALIBRATION, Calibration).layers
    tokens = sorted(layers[0].tokens_of_experts())
    experts = [expert for layer in layers for expert in layer.experts]
    count = len(layers[0].experts)
    return {
        "layer_seconds": round((clock.end - clock.begin) / LAYERS, 2),
        "seconds_at_first_and_last_expert_of_each_layer": [
            [round(clock.experts[i * count], 2), round(clock.experts[(i + 1) * count - 1], 2)] for i in range(LAYERS)
        ],
        "whole_command_seconds": round(seconds, 2),
        "vram_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "vram_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "host_memory_gb": {kind: round(peak / 1e9, 2) for kind, peak in resident.peaks.items()},
        "tokens_an_expert": [tokens[0], tokens[len(tokens) // 2], tokens[-1]],
        "mean_w13_error": sum(e.w13_error for e in experts) / len(experts),
        "mean_w2_error": sum(e.w2_error for e in experts) / len(experts),
    }


class PeakMemory:
    """The largest resident memory of this process by kind, in bytes, sampled twenty times a second."""

    KINDS = ("RssAnon", "RssFile", "RssShmem")

    def __enter__(self) -> "PeakMemory":
        self.peaks = dict.fromkeys(self.KINDS, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                kind, _, value = line.partition(":")
                if kind in self.peaks:
                    self.peaks[kind] = max(self.peaks[kind], 1024 * int(value.split()[0]))


def write_source(path: Path, config: dict[str, Any]) -> None:
    """A random checkpoint, written by way of the plan's own shard layout."""
    from lightship.architecture import architecture_of
    from lightship.quant.layout import Shards
    from lightship.quant.plan import PlannedOutput

    path.mkdir(parents=True)
    torch.manual_seed(0)
    tensors: list[PlannedOutput] = []
    for name, weight in architecture_of(config).weights(config).items():
        if weight.linear:
            blocks = [-(-side // 128) for side in weight.shape]
            tensors += [PlannedOutput(name, "F8_E4M3", list(weight.shape))]
            tensors += [PlannedOutput(f"{name}_scale_inv", "F32", blocks)]
        else:
            dtype = "F32" if name.endswith("bias") else "BF16"
            tensors.append(PlannedOutput(name, dtype, list(weight.shape)))
    shards = Shards(path, tensors)
    shards.reserve()
    with ThreadPoolExecutor(4) as pool:
        waiting = []
        for tensor in tensors:
            if tensor.dtype == "F8_E4M3":
                w_OI = torch.randn(tensor.shape, device="cuda") * tensor.shape[1] ** -0.5
                q_OI, scale_inv = quantize_fp8_blocks(w_OI)
                waiting += [pool.submit(shards.write, tensor.name, q_OI.cpu())]
                waiting += [pool.submit(shards.write, f"{tensor.name}_scale_inv", scale_inv.cpu())]
            elif not tensor.name.endswith("_scale_inv"):
                dtype = torch.float32 if tensor.dtype == "F32" else torch.bfloat16
                # Embeddings of one outweigh what attention adds, so the router spreads the words evenly.
                spread = {"norm.weight": 0.0, "bias": 0.01, "tokens.weight": 1.0}
                by = next((s for end, s in spread.items() if tensor.name.endswith(end)), tensor.shape[-1] ** -0.5)
                value = torch.randn(tensor.shape) * by if by else torch.ones(tensor.shape)
                waiting.append(pool.submit(shards.write, tensor.name, value.to(dtype)))
        for future in waiting:
            future.result()
    shards.sync()
    shards.write_index()
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path, config["vocab_size"])


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """A word is a token: `w0`, `w1`, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", eos_token="w1").save_pretrained(path)


def write_text(folder: Path, vocabulary: int, sequences: int, sequence_tokens: int) -> CalibrationText:
    """Random words, so that the random router spreads them over the experts."""
    words = torch.randint(2, vocabulary, (sequences * sequence_tokens,), generator=torch.Generator())
    path = folder / "text.txt"
    path.write_text(" ".join(f"w{word}" for word in words.tolist()))
    return CalibrationText(
        sources=[TextSource(scene="words", path=str(path))],
        tokens_per_scene=sequences * sequence_tokens,
        sequence_tokens=sequence_tokens,
    )


def drop_page_cache(checkpoint: Checkpoint) -> None:
    """Forget the shards' cached pages, so that the next read comes from the disk."""
    os.sync()
    for shard in checkpoint.shards:
        with (checkpoint.path / shard).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bandwidth(checkpoint: Checkpoint) -> float:
    """Bytes a second of reading 4 GB of the shards cold, 32 MB at a time on four threads."""
    drop_page_cache(checkpoint)
    piece = READ_BYTES // 128
    parts = [
        (checkpoint.path / shard, offset)
        for shard in checkpoint.shards
        for offset in range(0, (checkpoint.path / shard).stat().st_size, piece)
    ][:128]
    buffers = threading.local()

    def read(part: tuple[Path, int]) -> int:
        if not hasattr(buffers, "value"):
            buffers.value = torch.empty(piece, dtype=torch.uint8)
        file = os.open(part[0], os.O_RDONLY)
        try:
            return os.preadv(file, [bytes_of(buffers.value)], part[1])
        finally:
            os.close(file)

    start = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        total = sum(pool.map(read, parts))
    return total / (time.perf_counter() - start)


def read_and_write_bandwidth(checkpoint: Checkpoint, folder: Path) -> float:
    """Bytes a second, both ways together, of reading 4 GB cold and at the same time writing 2 GB to the disk."""
    data = torch.randint(0, 255, (1 << 26,), dtype=torch.uint8)
    path = folder / "written"

    def write() -> None:
        with path.open("wb") as file:
            for _ in range(32):
                file.write(bytes_of(data))
                file.flush()
                os.fdatasync(file.fileno())

    start = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        read_bandwidth(checkpoint)
        writing.result()
    seconds = time.perf_counter() - start
    path.unlink()
    return (READ_BYTES + 32 * len(data)) / seconds


def pcie_bandwidth() -> float:
    """Bytes a second from pinned memory to the GPU."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    device.copy_(host)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(8):
        device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 8 * len(host) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
