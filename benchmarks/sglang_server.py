"""Stock SGLang serving FP8, W4AFP8 with its own kernels, and W4AFP8 with lightship's plugin: same answers? how fast?

Two models. The demo model: its log-probabilities against those of the local engine, which is the reference. And a
random one with what one rank of eight holds of DeepSeek-V3's layers (hidden 7168, 256 experts of 256, 16 heads), as
many layers as fit, timed by SGLang's own client. A stage's servers run at once on one GPU, and are asked in turns.

    python -m benchmarks.sglang_server prepare WORK          # lightship's environment, a CPU is enough: the demo model
    python -m benchmarks.sglang_server site DIR              # lightship and its entry point, for PYTHONPATH
    python -m benchmarks.sglang_server demo WORK             # SGLang's environment from here on
    python -m benchmarks.sglang_server model BIG --layers 16 # the random model, FP8 and W4AFP8
    python -m benchmarks.sglang_server bench BIG --seconds 500
    python -m benchmarks.sglang_server merge FILE...         # results from elsewhere; also the table in docs/sglang.md

Each writes what it has found after every step into $OUT/sglang_server.json (benchmarks/ by default). There, servers
of the demo model stay beside those of another run of the same day, GPU, versions and flags, each with its own date.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo" / "checkpoint"
OUT = Path(os.environ.get("OUT", ROOT / "benchmarks")) / "sglang_server.json"
COMMAND = "python -m benchmarks.sglang_server"
PAGE = ROOT / "docs" / "sglang.md"
START, END = "<!-- written by benchmarks.sglang_server -->", "<!-- end -->"
FIRST_PORT = 30100

FLAGS = [
    *("--tp", "1", "--trust-remote-code", "--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--mem-fraction-static", "0.9", "--disable-radix-cache", "--host", "127.0.0.1"),
]
STAGE_FLAGS = {
    "demo": ["--max-total-tokens", "65536", "--max-running-requests", "32", "--cuda-graph-bs", "1", "2", "4", "8"],
    "bench": [
        *("--max-total-tokens", "131072", "--max-running-requests", "256", "--chunked-prefill-size", "4096"),
        *("--cuda-graph-bs", "1", "2", "4", "8", "16", "32", "64", "128", "256"),
    ],
}


@dataclass(frozen=True)
class Configuration:
    """One way to serve: which checkpoint, with which flags and environment, and what its reference is called."""

    checkpoint: str
    flags: tuple[str, ...]
    environment: dict[str, str]
    reference: str


CONFIGURATIONS = {
    "fp8": Configuration("fp8", ("--moe-runner-backend", "triton"), {"LIGHTSHIP_MOE": "off"}, "fp8"),
    "fp8-deepgemm": Configuration(
        "fp8",
        ("--moe-runner-backend", "deep_gemm"),
        {"LIGHTSHIP_MOE": "off", "SGLANG_ENABLE_JIT_DEEPGEMM": "1", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"},
        "fp8",
    ),
    "stock": Configuration("w4afp8", ("--quantization", "w4afp8"), {"LIGHTSHIP_MOE": "off"}, "w4afp8 static"),
    "plugin": Configuration("w4afp8", ("--quantization", "w4afp8"), {"LIGHTSHIP_MOE": "on"}, "w4afp8 dynamic"),
    "plugin-static": Configuration(
        "w4afp8",
        ("--quantization", "w4afp8"),
        {"LIGHTSHIP_MOE": "on", "LIGHTSHIP_MOE_ACTIVATIONS": "static"},
        "w4afp8 static",
    ),
}
DEFAULT = ("fp8", "stock", "plugin")

SEQUENCES, SEQUENCE_TOKENS = 8, 256
NOISE = 1.15
"""A W4AFP8 server may differ from its reference, in the mean of |log-probability - reference|, by this factor more than
the FP8 server of the same run differs from its own: that is SGLang's bf16 and its kernels, not the experts."""
DIFFERENCE = 0.2
"""No server, FP8 or not, may differ from its reference by more than this in that mean: otherwise an FP8 server that is
wrong would excuse the others. sglang_server.json has 0.122 for FP8 and 0.128 for SGLang's W4AFP8."""
DISTANCE = "mean_absolute_difference to the local engine"
MEAN_SHIFT = 0.02
"""And the mean log-probability may be off by this many nats a token."""

PROMPT_TOKENS, OUTPUT_TOKENS = 256, 128
ROUNDS = 3
"""Of each load; the first compiles what is left to compile, and is not counted."""
VOCABULARY = 8192
CALIBRATION_SEQUENCES, CALIBRATION_SEQUENCE_TOKENS = 64, 512


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "site", "demo", "model", "bench", "client", "merge"])
    parser.add_argument("work", nargs="+", type=lambda text: Path(text).absolute(), help="a folder; of merge, files")
    parser.add_argument("--configurations", nargs="+", choices=list(CONFIGURATIONS), default=list(DEFAULT))
    parser.add_argument("--concurrencies", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--layers", type=int, default=16, help="MoE layers of the random model (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=540, help="end after this time (default: %(default)s)")
    parser.add_argument("--flags", default="", help="more flags for every server, in one string")
    arguments = parser.parse_args()
    if arguments.step == "merge":
        merge(arguments.work, OUT)
        write_table(OUT, PAGE)
        return
    if len(arguments.work) > 1:
        parser.error(f"the step {arguments.step} takes one folder, not {len(arguments.work)}")
    [arguments.work] = arguments.work
    arguments.work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + arguments.seconds
    match arguments.step:
        case "prepare":
            prepare(arguments.work)
        case "site":
            write_site(arguments.work)
        case "model":
            write_model(arguments.work, arguments.layers)
        case "client":
            run_client(arguments.work)
        case stage:
            if stage == "demo" and not (arguments.work / "fp8").exists():
                (arguments.work / "fp8").symlink_to(DEMO)
            flags = [*FLAGS, *STAGE_FLAGS[stage], *arguments.flags.split()]
            if importlib.util.find_spec("prometheus_client"):
                flags.append("--enable-metrics")
            with serving(arguments.work, arguments.configurations, flags, deadline - 20) as servers:
                result = Result(stage, flags, servers)
                if stage == "demo":
                    compare_answers(arguments.work, servers, result)
                else:
                    measure_speed(arguments.work, servers, arguments.concurrencies, deadline, result)
            result.show()


# What a CPU can prepare.


def prepare(work: Path) -> None:
    """The demo model as W4AFP8, and the local engine's log-probabilities of held-out text: WORK/reference.json."""
    import torch

    from lightship.causal_lm import load_causal_lm, load_tokenizer
    from lightship.checkpoint import Checkpoint
    from lightship.progress import tracked
    from lightship.quant.plan import plan_quantization
    from lightship.quant.quantize import quantize
    from lightship.recipe import load_recipe
    from lightship.text import read_sequences

    recipe = load_recipe(ROOT / "recipes" / "demo.toml")
    source, out = DEMO, work / "w4afp8"
    if not out.exists():
        checkpoint = Checkpoint.open(source)
        quantize(checkpoint, plan_quantization(checkpoint), recipe.calibration, recipe.quantization, out, tracked)
    tokenizer = load_tokenizer(source)
    wanted = SEQUENCES * SEQUENCE_TOKENS
    ids = torch.stack(
        [s for text in recipe.fidelity.sources for s in read_sequences(text, tokenizer, wanted, SEQUENCE_TOKENS)]
    )
    reference: dict[str, Any] = {"ids": ids.tolist()}
    for name, path, activations in (
        ("fp8", source, "dynamic"),
        ("w4afp8 static", out, "static"),
        ("w4afp8 dynamic", out, "dynamic"),
    ):
        model = load_causal_lm(path, activations=activations)  # type: ignore[arg-type]
        with torch.inference_mode():
            logits = torch.cat([model(batch, use_cache=False).logits[:, :-1] for batch in ids.split(8)])
        reference[name] = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].tolist()
    (work / "reference.json").write_text(json.dumps(reference))


def write_site(site: Path) -> None:
    """lightship as one folder for PYTHONPATH, with the metadata by which SGLang finds the plugin."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        target = site.joinpath(*package.split("."))
        shutil.copytree(ROOT / folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    info = site / "lightship-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightship\nVersion: 0\n")
    lines = [
        line
        for group, points in project["project"]["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def write_model(work: Path, layers: int) -> None:
    """The random model in WORK/fp8, and as W4AFP8, by absmax on random words, in WORK/w4afp8."""
    from benchmarks.moe_layer import CONFIG, write_source

    shard = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers + 1,
        "first_k_dense_replace": 1,
        **{name: CONFIG[name] // 8 for name in ("intermediate_size", "moe_intermediate_size", "num_attention_heads")},
        "num_key_value_heads": CONFIG["num_key_value_heads"] // 8,
    }
    steps = {
        "fp8": lambda path: write_source(path, CONFIG | shard),
        "w4afp8": lambda path: _quantize(work / "fp8", path),
    }
    for name, make in steps.items():
        if not (work / name).exists():
            start = time.monotonic()
            make(work / name)
            print(f"{name}: written in {time.monotonic() - start:.0f} s", flush=True)


def _quantize(source: Path, out: Path) -> None:
    from benchmarks.moe_layer import write_text

    from lightship.checkpoint import Checkpoint
    from lightship.progress import tracked
    from lightship.quant.plan import plan_quantization
    from lightship.quant.quantize import quantize
    from lightship.recipe import Quantization

    text = write_text(out.parent, VOCABULARY, CALIBRATION_SEQUENCES, CALIBRATION_SEQUENCE_TOKENS)
    checkpoint = Checkpoint.open(source)
    quantize(checkpoint, plan_quantization(checkpoint), text, Quantization(method="absmax"), out, tracked)


# Servers.


@dataclass
class Server:
    """A running SGLang server, and how long it took."""

    name: str
    url: str
    process: "subprocess.Popen[bytes]"
    log: Path
    started: float = field(default_factory=time.monotonic)
    ready_seconds: float | None = None

    def is_healthy(self) -> bool:
        """Whether /health answers 200."""
        with suppress(OSError):
            return urllib.request.urlopen(f"{self.url}/health", timeout=3).status == 200
        return False

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a JSON request."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=120))

    def activity(self) -> Any:
        """What the plugin says of itself, in the server's state; None where it does nothing."""
        info = json.load(urllib.request.urlopen(f"{self.url}/server_info", timeout=30))
        return info["internal_states"][0].get("lightship_moe")

    def gauge(self) -> list[str]:
        """The plugin's lines in /metrics; none where it does nothing, or prometheus_client is not there."""
        with suppress(OSError):
            lines = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode().splitlines()
            return [line for line in lines if line.startswith("lightship_moe_active")]
        return []


@contextmanager
def serving(work: Path, names: list[str], flags: list[str], until: float) -> Iterator[list[Server]]:
    """All these configurations at once; those that come up by `until`, whatever becomes of the others."""
    if not any(point.name == "lightship" for point in entry_points(group="sglang.srt.plugins")):
        raise SystemExit(
            "lightship's plugin is not installed here: run the step `site`, and put the folder on PYTHONPATH"
        )
    with ExitStack() as stack:
        servers = [_launch(work, name, FIRST_PORT + 100 * i, flags) for i, name in enumerate(names)]
        for server in servers:
            stack.callback(_end, server)
        waiting = list(servers)
        while waiting and time.monotonic() < until:
            for server in list(waiting):
                if server.is_healthy():
                    server.ready_seconds = round(time.monotonic() - server.started, 1)
                    print(f"{server.name}: ready after {server.ready_seconds} s", flush=True)
                    waiting.remove(server)
                elif server.process.poll() is not None:
                    waiting.remove(server)
            time.sleep(1)
        for server in servers:
            if server.ready_seconds is None:
                tail = server.log.read_text(errors="replace").splitlines()[-30:]
                print(f"{server.name}: not ready, exit code {server.process.poll()}", *tail, sep="\n  | ", flush=True)
        yield [server for server in servers if server.ready_seconds is not None]


def _launch(work: Path, name: str, port: int, flags: list[str]) -> Server:
    configuration = CONFIGURATIONS[name]
    path = work / configuration.checkpoint
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(path), "--port", str(port)]
    environment = os.environ | configuration.environment | {"SGLANG_MOE_CONFIG_DIR": str(_tuned_configurations(work))}
    log = Path(os.environ.get("OUT", work)) / f"sglang-{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *flags, *configuration.flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=work,
        )
    return Server(name, f"http://127.0.0.1:{port}", process, log)


def _end(server: Server) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(10)


def _tuned_configurations(work: Path) -> Path:
    """SGLang's Triton configurations for FP8 experts, the H200's also under an H100's name: it ships none for that."""
    import torch

    folder = work / "moe_configurations"
    if not folder.exists():
        [sglang] = importlib.util.find_spec("sglang").submodule_search_locations
        shutil.copytree(Path(sglang, "srt/layers/moe/moe_runner/triton_utils/configs"), folder / "configs")
        device = torch.cuda.get_device_name().replace(" ", "_")
        for file in list(folder.rglob("E=25[67],N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,*.json")):
            twin = file.with_name(file.name.replace("NVIDIA_H200", device))
            if not twin.exists():
                shutil.copy(file, twin)
    return folder


# What is asked of them.


class Result:
    """The result file: one entry a stage, rewritten after every step."""

    def __init__(self, stage: str, flags: list[str], servers: list[Server], file: Path = OUT) -> None:
        import torch

        self.stage, self.file = stage, file
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.entry: dict[str, Any] = {
            "command": f"{COMMAND} {stage} WORK",
            "date": date,
            "gpu": torch.cuda.get_device_name(),
            "torch": str(torch.__version__),
            "sglang": version("sglang"),
            "flags": " ".join(flags),
            "servers": {
                server.name: {
                    "date": date,
                    "flags": " ".join(CONFIGURATIONS[server.name].flags),
                    "environment": CONFIGURATIONS[server.name].environment,
                    "ready_seconds": server.ready_seconds,
                    "lightship_moe": server.activity(),
                    "lightship_moe_active": server.gauge(),
                }
                for server in servers
            },
        }
        self.save()

    def save(self) -> None:
        """Write the file, keeping the other stages', and servers of this one where that makes sense."""
        kept = json.loads(self.file.read_text()) if self.file.exists() else {}
        entry = self.entry if differences(kept.get(self.stage), self.entry) else together(kept[self.stage], self.entry)
        self.file.write_text(json.dumps(kept | {self.stage: entry}, indent=2) + "\n")

    def show(self) -> None:
        """Print this stage's entry."""
        print(json.dumps(self.entry, indent=1))


def differences(old: dict[str, Any] | None, new: dict[str, Any]) -> list[str]:
    """Why the servers of two entries of a stage cannot stand side by side; empty if they can."""
    if old is None:
        return ["there is only one"]
    if "runs" in old or "runs" in new:
        return ["speeds are compared in one run"]
    days = [f"date {old['date'][:10]} and {new['date'][:10]}"] * (old["date"][:10] != new["date"][:10])
    return days + [
        f"{key} {old[key]} and {new[key]}" for key in ("gpu", "torch", "sglang", "flags") if old[key] != new[key]
    ]


def together(*entries: dict[str, Any]) -> dict[str, Any]:
    """Entries of a stage as one: a server is as the last one has it, with the date of its entry, and judged anew."""
    servers = {name: {"date": entry["date"]} | found for entry in entries for name, found in entry["servers"].items()}
    entry = entries[-1] | {"servers": servers}
    _judge(entry)
    return entry


def merge(files: list[Path], out: Path) -> None:
    """Put results from elsewhere together in `out`.

    Raises:
        SystemExit: a file is not there, or its servers cannot stand beside the others.
    """
    merged: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise SystemExit(f"{file} is not there: name sglang_server.json files that this benchmark wrote")
        for stage, entry in json.loads(file.read_text()).items():
            if stage in merged and (reasons := differences(merged[stage], entry)):
                raise SystemExit(f"{file}: its stage {stage} cannot be merged: {'; '.join(reasons)}; run it again")
            merged[stage] = together(merged[stage], entry) if stage in merged else entry
    kept = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(kept | merged, indent=2) + "\n")


def write_table(result: Path, page: Path) -> None:
    """The demo model's servers, as a table between the page's marks."""
    before, rest = page.read_text().split(START)
    entry = json.loads(result.read_text())["demo"]
    page.write_text(f"{before}{START}\n\n{table(entry)}\n\n{END}{rest.split(END)[1]}")


def table(entry: dict[str, Any]) -> str:
    """What ran where and when, and a row for each server."""
    titles = [
        *("server", "date", "mean log-probability", "local engine's", "mean absolute difference", "agrees"),
        *("questions right", "ready after, s"),
    ]
    rows = []
    for name, found in entry["servers"].items():
        if DISTANCE not in found:
            rows.append([name, found["date"][:16].replace("T", " "), found.get("error", "no answer"), *[""] * 5])
            continue
        means = (
            f"{found[key]:.4f}" for key in ("mean_log_probability", "mean_log_probability, local engine", DISTANCE)
        )
        verdict = "yes" if found["agrees"] else "**no**"
        right = f"{found['accuracy'] * found['questions']:.0f} of {found['questions']}, {100 * found['accuracy']:.2f} %"
        rows.append(
            [name, found["date"][:16].replace("T", " "), *means, verdict, right, f"{found['ready_seconds']:.0f}"]
        )
    lines = [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]
    about = f"`{entry['command']}`, {entry['gpu']}, SGLang {entry['sglang']}, torch {entry['torch']}."
    return "\n".join([about, f"Agrees: {entry['tolerance'].replace('_', ' ')}.", "", *lines])


def compare_answers(work: Path, servers: list[Server], result: Result) -> None:
    """Each server's log-probabilities of the same tokens, and its answers to the demo's questions."""
    reference = json.loads((work / "reference.json").read_text())
    served: dict[str, list[float]] = {}
    for server in servers:
        expected = [x for row in reference[CONFIGURATIONS[server.name].reference] for x in row]
        found = result.entry["servers"][server.name]
        try:
            rows = [x for ids in reference["ids"] for x in _log_probabilities(server, ids)]
            right = _answers_right(server)
        except OSError as error:  # the others are still worth asking
            found["error"] = repr(error)
            continue
        finally:
            result.save()
        served[server.name] = rows
        found |= {
            "tokens": len(rows),
            "mean_log_probability": statistics.fmean(rows),
            "mean_log_probability, local engine": statistics.fmean(expected),
            DISTANCE: _mean_difference(rows, expected),
            "questions": len(right),
            "accuracy": statistics.fmean(right),
        }
        result.save()
    _judge(result.entry)
    if {"stock", "plugin"} <= served.keys():
        between = _mean_difference(served["plugin"], served["stock"])
        result.entry["mean_absolute_difference of plugin and stock"] = between
    result.save()


def _judge(entry: dict[str, Any]) -> None:
    """Say of each server that has answered whether it agrees with the local engine."""
    answered = {name: found for name, found in entry["servers"].items() if DISTANCE in found}
    entry["tolerance"] = (
        f"mean_absolute_difference at most {DIFFERENCE}, and {NOISE} x that of fp8 if it is there; "
        f"mean_log_probability within {MEAN_SHIFT}"
    )
    limit = min(DIFFERENCE, NOISE * answered["fp8"][DISTANCE]) if "fp8" in answered else DIFFERENCE
    for name, found in answered.items():
        shift = found["mean_log_probability"] - found["mean_log_probability, local engine"]
        own_limit = DIFFERENCE if name == "fp8" else limit
        found["agrees"] = bool(found[DISTANCE] <= own_limit and abs(shift) <= MEAN_SHIFT)


def _log_probabilities(server: Server, ids: list[int]) -> list[float]:
    sampling = {"max_new_tokens": 1, "temperature": 0}
    body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    return [entry[0] for entry in server.post("/generate", body)["meta_info"]["input_token_logprobs"]][1:]


def _answers_right(server: Server) -> list[bool]:
    sys.path.insert(0, str(ROOT / "demo" / "training"))
    import questions

    rows = questions.read_jsonl(ROOT / "demo" / "questions" / "test.jsonl")
    examples = questions.read_jsonl(ROOT / "demo" / "questions" / "validation.jsonl")

    def is_right(row: dict[str, Any]) -> bool:
        shots = [e for e in examples if e["category"] == row["category"]][:5]
        body = {"model": "demo", "prompt": questions.prompt(row, shots), "max_tokens": 64, "temperature": 0}
        text = server.post("/v1/completions", body | {"stop": ["Question:"]})["choices"][0]["text"]
        found = re.search(r"answer is \(?([ABCDEFGHIJ])\)?", text)
        return found is not None and found[1] == row["answer"]

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(is_right, rows))


def _mean_difference(a: list[float], b: list[float]) -> float:
    return statistics.fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def measure_speed(work: Path, servers: list[Server], concurrencies: list[int], deadline: float, result: Result) -> None:
    """Time every load on every server, in turns, by SGLang's client; one process of it runs all of them."""
    jobs = [
        {"server": server.name, "url": server.url, "concurrency": concurrency, "round": number}
        for concurrency in concurrencies
        for number in range(ROUNDS)
        for server in servers
    ]
    (work / "jobs.json").write_text(json.dumps(jobs))
    done = work / "done.jsonl"
    done.unlink(missing_ok=True)
    log = Path(os.environ.get("OUT", work)) / "client.log"
    with log.open("wb") as file:
        client = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sglang_server", "client", str(work)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=ROOT,
        )
    try:
        while client.poll() is None and time.monotonic() < deadline:
            time.sleep(2)
            _collect(done, result)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(client.pid, signal.SIGKILL)
        client.wait()
    _collect(done, result)
    if len(result.entry["runs"]) < len(jobs):
        print(f"{len(result.entry['runs'])} of {len(jobs)} loads were run; the end of {log}:")
        print(*log.read_text(errors="replace").splitlines()[-20:], sep="\n  | ", flush=True)


def _collect(done: Path, result: Result) -> None:
    lines = done.read_text().splitlines() if done.exists() else []
    result.entry["runs"] = [json.loads(line) for line in lines]
    result.entry["medians"] = _medians(result.entry["runs"])
    result.save()


def _medians(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Concurrency -> server -> figure, the median of the counted rounds, and tokens/s over FP8's and over stock's."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    counted = [run for run in runs if run["round"] > 0 and "error" not in run]
    for key in dict.fromkeys((run["concurrency"], run["server"]) for run in counted):
        mine = [run for run in counted if (run["concurrency"], run["server"]) == key]
        figures = {name: round(statistics.median(run[name] for run in mine), 3) for name in FIGURES.values()}
        table.setdefault(str(key[0]), {})[key[1]] = figures
    for row in table.values():
        for base in ("fp8", "stock"):
            for figures in row.values():
                if base in row:
                    figures[f"tokens/s over {base}"] = round(
                        figures["tokens_per_second"] / row[base]["tokens_per_second"], 3
                    )
    return table


FIGURES = {
    "output_throughput": "tokens_per_second",
    "median_ttft_ms": "median_ttft_ms",
    "p99_ttft_ms": "p99_ttft_ms",
    "median_tpot_ms": "median_tpot_ms",
    "p99_tpot_ms": "p99_tpot_ms",
    "duration": "seconds",
    "completed": "completed",
}
"""SGLang's names of the figures that are kept, and ours."""


def run_client(work: Path) -> None:
    """SGLang's benchmark client, load after load in one process: importing it takes longer than a load."""
    try:
        import datasets  # noqa: F401
    except ImportError:  # only a data set that is not used here needs it
        sys.modules["datasets"] = type(sys)("datasets")
        sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]
    from sglang.benchmark import serving as client

    found: list[dict[str, Any]] = []
    run = client.run_benchmark
    client.run_benchmark = lambda arguments: found.append(run(arguments))
    for job in json.loads((work / "jobs.json").read_text()):
        requests = max(8, 2 * job["concurrency"])
        sys.argv = [
            *("bench_serving", "--backend", "sglang", "--base-url", job["url"], "--dataset-name", "random-ids"),
            *("--tokenize-prompt", "--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS)),
            *(
                "--random-range-ratio",
                "1.0",
                "--num-prompts",
                str(requests),
                "--max-concurrency",
                str(job["concurrency"]),
            ),
            *("--temperature", "1.0", "--seed", str(job["round"]), "--warmup-requests", "1", "--disable-tqdm"),
            *("--output-file", str(work / "bench_serving.jsonl")),
        ]
        try:
            client.cli_main()
            figures = {ours: found[-1][theirs] for theirs, ours in FIGURES.items()}
            if figures["completed"] != requests:
                figures["error"] = f"{figures['completed']} of {requests} requests were answered"
        except (Exception, SystemExit) as error:
            figures = {"error": repr(error)[:300]}
        with (work / "done.jsonl").open("a") as file:
            file.write(json.dumps(job | figures) + "\n")


if __name__ == "__main__":
    main()
