"""Does stock SGLang load and serve what lightship writes? The demo model, FP8 and W4AFP8, on one GPU.

`prepare` quantizes the demo checkpoint and computes reference log-probabilities with the local engine's model; `serve`
launches SGLang on both checkpoints, asks the demo questions, and compares its log-probabilities with the reference.
They are two steps because SGLang brings its own transformers.

    python benchmarks/sglang_loads.py prepare WORK                                   # lightship's environment
    python benchmarks/sglang_loads.py serve WORK --out benchmarks/sglang_loads.json  # SGLang's environment
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "demo" / "checkpoint"
FLAGS = [
    "--tp",
    "1",
    "--trust-remote-code",
    "--attention-backend",
    "triton",
    "--sampling-backend",
    "pytorch",
    "--grammar-backend",
    "none",
    "--mem-fraction-static",
    "0.2",
    "--max-total-tokens",
    "65536",
    "--max-running-requests",
    "32",
    "--cuda-graph-max-bs",
    "8",
    "--host",
    "127.0.0.1",
]
FORMATS = {"fp8": ["--moe-runner-backend", "triton"], "w4afp8": ["--quantization", "w4afp8"]}
SEQUENCES, SEQUENCE_TOKENS = 8, 256
ANSWER = re.compile(r"answer is \(?([ABCDEFGHIJ])\)?")
READY_SECONDS = 200


def prepare(work: Path) -> None:
    """Write WORK/w4afp8 and WORK/reference.json."""
    import torch

    from lightship.causal_lm import load_causal_lm, load_tokenizer
    from lightship.checkpoint import Checkpoint
    from lightship.progress import tracked
    from lightship.quant.calibrate import calibrate
    from lightship.quant.plan import plan_quantization
    from lightship.quant.quantize import quantize
    from lightship.quant.verify import verify
    from lightship.recipe import load_recipe
    from lightship.text import read_sequences

    recipe = load_recipe(ROOT / "recipes" / "demo.toml")
    checkpoint = Checkpoint.open(SOURCE)
    calibration = calibrate(SOURCE, recipe.calibration, work, tracked)
    out = work / "w4afp8"
    quantize(checkpoint, plan_quantization(checkpoint), calibration, work, recipe.quantization, out, tracked)
    assert verify(out, SOURCE).passed
    tokenizer = load_tokenizer(SOURCE)
    wanted = SEQUENCES * SEQUENCE_TOKENS
    ids = torch.stack(
        [s for t in recipe.fidelity.sources for s in read_sequences(t, tokenizer, wanted, SEQUENCE_TOKENS)]
    )
    reference: dict[str, Any] = {"ids": ids.tolist()}
    models = {"fp8": (SOURCE, "dynamic"), "w4afp8": (out, "static"), "w4afp8 dynamic": (out, "dynamic")}
    for name, (path, activations) in models.items():
        model = load_causal_lm(path, activations=activations)  # type: ignore[arg-type]
        with torch.inference_mode():
            logits = torch.cat([model(batch, use_cache=False).logits[:, :-1] for batch in ids.split(8)])
        reference[name] = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].tolist()
    (work / "reference.json").write_text(json.dumps(reference))


def serve(work: Path, out: Path) -> None:
    """Launch both servers side by side, measure, and write `out`."""
    reference = json.loads((work / "reference.json").read_text())
    paths = {"fp8": SOURCE, "w4afp8": work / "w4afp8"}
    servers = {name: _launch(paths[name], 30017 + 1000 * i, FORMATS[name], work) for i, name in enumerate(paths)}
    result: dict[str, Any] = {
        "command": "python benchmarks/sglang_loads.py serve WORK",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": _gpu(),
        "sglang": _version("sglang"),
        "flags": " ".join(FLAGS),
        "formats": {},
    }
    try:
        for name, (process, url, started) in servers.items():
            _wait(process, url, started)
            result["formats"][name] = {"ready_seconds": round(time.time() - started, 1)} | _measure(
                url, reference, name
            )
            out.write_text(json.dumps(result, indent=2) + "\n")
    finally:
        for process, _, _ in servers.values():
            os.killpg(process.pid, signal.SIGKILL)
    print(json.dumps(result, indent=2))


def _launch(path: Path, port: int, flags: list[str], work: Path) -> tuple["subprocess.Popen[bytes]", str, float]:
    command = [
        sys.executable,
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(path),
        "--port",
        str(port),
        *FLAGS,
        *flags,
    ]
    with (work / f"sglang-{port}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    return process, f"http://127.0.0.1:{port}", time.time()


def _wait(process: "subprocess.Popen[bytes]", url: str, started: float) -> None:
    while process.poll() is None and time.time() - started < READY_SECONDS:
        try:
            if urllib.request.urlopen(f"{url}/health", timeout=3).status == 200:
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise SystemExit(f"{url} is not ready: exit code {process.poll()}")


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=120))


def _measure(url: str, reference: dict[str, Any], name: str) -> dict[str, Any]:
    sampling = {"max_new_tokens": 1, "temperature": 0}

    def log_probabilities(ids: list[int]) -> list[float]:
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        return [entry[0] for entry in _post(f"{url}/generate", body)["meta_info"]["input_token_logprobs"]][1:]

    sys.path.insert(0, str(ROOT / "demo" / "training"))
    import questions

    rows = questions.read_jsonl(ROOT / "demo" / "questions" / "test.jsonl")
    examples = questions.read_jsonl(ROOT / "demo" / "questions" / "validation.jsonl")

    def is_right(row: dict[str, Any]) -> bool:
        shots = [e for e in examples if e["category"] == row["category"]][:5]
        body = {"model": "demo", "prompt": questions.prompt(row, shots), "max_tokens": 64, "temperature": 0}
        text = _post(f"{url}/v1/completions", body | {"stop": ["Question:"]})["choices"][0]["text"]
        found = ANSWER.search(text)
        return found is not None and found[1] == row["answer"]

    with ThreadPoolExecutor(32) as pool:
        served = list(pool.map(log_probabilities, reference["ids"]))
        right = list(pool.map(is_right, rows))
    flat = [x for row in served for x in row]
    found = {
        "questions": len(rows),
        "accuracy": sum(right) / len(right),
        "tokens": len(flat),
        "mean_log_probability": sum(flat) / len(flat),
    }
    for key in (k for k in reference if k.startswith(name)):
        expected = [x for row in reference[key] for x in row]
        found[f"mean_log_probability, local engine, {key}"] = sum(expected) / len(expected)
        differences = [abs(a - b) for a, b in zip(flat, expected, strict=True)]
        found[f"mean_absolute_difference to local engine, {key}"] = sum(differences) / len(flat)
    return found


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "serve"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "sglang_loads.json")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.step == "prepare":
        prepare(arguments.work)
    else:
        serve(arguments.work, arguments.out)


if __name__ == "__main__":
    main()
