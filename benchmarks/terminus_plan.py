"""The plan of DeepSeek-V3.1-Terminus and of Kimi-K2, from headers of their true shapes without the weights.

python benchmarks/terminus_plan.py     # writes benchmarks/terminus_plan.json
"""

import json
import os
import struct
import tempfile
import time
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

TERMINUS: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = TERMINUS | {
    "model_type": "kimi_k2",
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 163840,
}
MODELS = {"DeepSeek-V3.1-Terminus": (TERMINUS, 163), "Kimi-K2": (KIMI_K2, 61)}


def write_headers(path: Path, config: dict[str, Any], shards: int) -> Path:
    """A checkpoint in FP8 blocks with all headers and no data: sparse files of the true sizes."""
    from lightship.architecture import architecture_of
    from lightship.census import SCALE, blocks_of
    from lightship.shards import BYTES_OF

    path.mkdir(parents=True, exist_ok=True)
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for name, weight in architecture_of(config).weights(config).items():
        if name.endswith("inv_freq"):
            continue
        if weight.linear:
            entries += [(name, "F8_E4M3", weight.shape), (name + SCALE, "F32", blocks_of(weight.shape))]
        else:
            entries.append((name, "F32" if name.endswith("correction_bias") else "BF16", weight.shape))
    weight_map = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:06d}.safetensors"
        header, end = {}, 0
        for name, dtype, shape in entries[number * len(entries) // shards : (number + 1) * len(entries) // shards]:
            begin, end = end, end + prod(shape) * BYTES_OF[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = shard
        raw = json.dumps(header).encode()
        with (path / shard).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + end)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    return path


def main() -> None:
    from lightship.checkpoint import Checkpoint
    from lightship.quant.preflight import preflight
    from lightship.recipe import Quantization

    measured: dict[str, Any] = {
        "command": "python benchmarks/terminus_plan.py",
        "machine": f"{os.cpu_count()} CPU cores, no GPU",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    for model, (config, shards) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = write_headers(Path(folder) / "model", config, shards)
            start = time.perf_counter()
            found = preflight(Checkpoint.open(path), Quantization(), probe_seconds=0, device="cpu")
            seconds = time.perf_counter() - start
        measured[model] = {
            "shards": shards,
            "tensors": found.tensors,
            "seconds": round(seconds, 2),
            "gb_before": round(found.bytes_before / 1e9, 1),
            "gb_after": round(found.bytes_after / 1e9, 1),
            "tensor_parallel": found.tensor_parallel,
            "parts_gb": {p.part: [round(n / 1e9, 2) for n in (p.bytes_before, p.bytes_after)] for p in found.parts},
            "tp8": {
                f.gpu: {
                    "weights_gb": round(f.weight_bytes / 1e9, 1),
                    "room_gb": round(f.room / 1e9, 1),
                    "cache_tokens": f.cache_tokens,
                }
                for f in found.fits
            },
        }
        print(model, json.dumps(measured[model], indent=1))
    (Path(__file__).parent / "terminus_plan.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
