"""Tensor against expert parallelism on eight GPUs: a simulation from measured kernel times, and the real comparison.

    python -m benchmarks.tp_vs_ep simulate          # a CPU; reads benchmarks/moe_kernel.json, writes tp_vs_ep.json, .md
    python -m benchmarks.tp_vs_ep render            # tp_vs_ep.md from tp_vs_ep.json
    python -m benchmarks.tp_vs_ep real CHECKPOINT   # eight GPUs and SGLang: both servers in turn, SGLang's own client

What is simulated is the MoE layer. Under TP-8 each rank does an eighth of every expert for every token, so all ranks
take the same time. Under EP-8 each rank does its own 32 experts whole, and the step waits for the rank that has most.
Times come from the kernels measured on one GPU with uniform routing, at the shapes of both; routing is drawn from a
Zipf law, or read off the demo model; all else is a model of a few constants, all of them here and in the result.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TIMES = ROOT / "benchmarks" / "moe_kernel.json"
OUT = Path(os.environ.get("OUT", ROOT / "benchmarks"))
COMMAND = "python -m benchmarks.tp_vs_ep simulate"

RANKS, EXPERTS, TOP, GROUPS, TOP_GROUPS = 8, 256, 8, 8, 4
HIDDEN, LAYERS = 7168, 58
"""DeepSeek-V3: its experts, its router's groups (32 experts, so EP-8 gives each rank one group), its MoE layers."""


@dataclass(frozen=True)
class Constants:
    """What is assumed, not measured here. All of it is the same for both, but for the exchange of `ep, all-to-all`."""

    nvlink_gb_s: float = 300.0
    """What an all-reduce or all-to-all over NVLink 4 reaches, of 450 one way."""
    exchange_latency_us: float = 12.0
    """Of one all-reduce, or of one direction of an all-to-all."""
    other_us: float = 60.0
    """A layer's attention, norms, router and shared expert, however few the tokens."""
    other_us_a_token: float = 0.16
    """And for each: 2 x 231 M weights / 8 ranks = 58 MFLOP, at 360 TFLOP/s."""
    prompt_tokens: int = 1024
    output_tokens: int = 256


CONSTANTS = Constants()
CONCURRENCIES = (16, 64, 256)
MIDDLE = str(CONCURRENCIES[1])
"""That a page speaks of; a key of the result as JSON has it."""
ENGINES = ("lightship", "sglang W4AFP8")
REFERENCE_TTFT, REFERENCE_QUERIES = -0.20, 0.14
"""What was reported elsewhere of TP over EP, with W4AFP8 experts on eight GPUs; how uneven routing was is not known."""
NEAR = 0.05
"""A simulation within so much of both is said to reproduce them."""
ZIPF = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
STEPS = 64
"""Draws of a step's routing; each is one layer of one step."""


# The kernel's time.


@dataclass(frozen=True)
class Kernel:
    """Measured times of the whole MoE layer at one shard, with uniform routing: tokens -> us.

    experts: on this rank. pairs_a_token: (token, expert) pairs that a token brings to this rank, 8 or 1.
    """

    us: dict[int, float]
    experts: int
    pairs_a_token: float

    def time(self, pairs: float, touched: float) -> float:
        """Microseconds for a rank with so many pairs, on so many different experts.

        Straight lines between the measured sizes, by pairs; then less for the experts that uniform routing would have
        touched and this did not, at the price of reading one.
        """
        tokens = pairs / self.pairs_a_token
        return max(self._between(tokens) - self.us_an_expert * (self.touched(tokens) - touched), self._between(0))

    def touched(self, tokens: float) -> float:
        """Experts of this rank that uniform routing of so many tokens touches, on average."""
        return self.experts * (1 - (1 - TOP / EXPERTS) ** tokens)

    @property
    def us_an_expert(self) -> float:
        """The slope of time over touched experts up to 64 tokens, where reading weights is nearly all the work."""
        few, many = min(self.us), 64
        return (self.us[many] - self.us[few]) / (self.touched(many) - self.touched(few))

    def _between(self, tokens: float) -> float:
        sizes = sorted(self.us)
        low = max([s for s in sizes[:-1] if s <= tokens], default=sizes[0])
        high = next(s for s in sizes if s > low)
        slope = (self.us[high] - self.us[low]) / (high - low)
        return self.us[low] + slope * (max(tokens, sizes[0]) - low)


def read_kernels(path: Path, engine: str) -> tuple[Kernel, Kernel]:
    """An engine at TP-8 and EP-8: rows {shape: "tp8", M: 16, engine:, us:} of benchmarks/moe_kernel.json.

    Raises:
        SystemExit: the file is not there, or lacks the engine at a shard, or at 1, 64 and more tokens.
    """
    if not path.is_file():
        raise SystemExit(
            f"{path} is not there: run benchmarks/moe_kernel.py on a Hopper GPU, or name a file by --times"
        )
    rows = json.loads(path.read_text())["rows"]
    us = {
        shape: {r["M"]: r["us"] for r in rows if (r["shape"], r["engine"]) == (shape, engine) and "us" in r}
        for shape in ("tp8", "ep8")
    }
    for shape, times in us.items():
        if missing := {1, 64, 1024} - times.keys():
            raise SystemExit(f"{path} lacks {engine!r} at {shape} for {sorted(missing)} tokens: measure them too")
    return Kernel(us["tp8"], EXPERTS, TOP), Kernel(us["ep8"], EXPERTS // RANKS, TOP / RANKS)


# Routing.


@dataclass(frozen=True)
class Routed:
    """One layer of one step: pairs and different experts of each rank under EP-8, different experts on all ranks, and
    the tokens that each rank receives in an all-to-all."""

    pairs: list[float]
    touched: list[float]
    touched_at_all: float
    received: list[float]


Router = Callable[[int, torch.Generator], Routed]
"""Routes a step of so many tokens."""


def zipf_router(skew: float) -> Router:
    """The k-th most wanted expert is wanted as 1 / k^skew, in an order drawn each time; DeepSeek's groups apply."""

    def route(tokens: int, generator: torch.Generator) -> Routed:
        wanted_E = torch.arange(1, EXPERTS + 1, dtype=torch.float64).log() * -skew
        wanted_E = wanted_E[torch.randperm(EXPERTS, generator=generator)]
        noise_TE = -torch.empty(tokens, EXPERTS, dtype=torch.float64).exponential_(generator=generator).log()
        return count(choose(wanted_E + noise_TE))

    return route


def choose(score_TE: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3's choice: the four groups with the best two experts, then the best eight experts of these, [T, 8]."""
    grouped_TGE = score_TE.view(-1, GROUPS, EXPERTS // GROUPS)
    best_TG = grouped_TGE.topk(2, dim=-1).values.sum(-1).topk(TOP_GROUPS, dim=-1).indices
    kept_TG = torch.zeros(len(score_TE), GROUPS, dtype=torch.bool).scatter_(1, best_TG, value=True)
    return grouped_TGE.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1).topk(TOP, dim=-1).indices


def count(chosen_TK: torch.Tensor) -> Routed:
    """What the ranks get, experts 0 to 31 on the first and so on."""
    pairs_RE = chosen_TK.flatten().bincount(minlength=EXPERTS).view(RANKS, -1)
    touched_R = (pairs_RE > 0).sum(1)
    here_TR = torch.nn.functional.one_hot(chosen_TK // (EXPERTS // RANKS), RANKS).amax(1)
    return Routed(pairs_RE.sum(1).tolist(), touched_R.tolist(), int(touched_R.sum()), here_TR.sum(0).tolist())


def demo_router(chosen: list[torch.Tensor], experts: int) -> Router:
    """Routing that the demo model did, [sequences, positions, K] for each layer, its experts over eight ranks in order.

    A step takes tokens at one position of different sequences, and more positions where it needs more. Its 16 experts
    say how uneven the ranks are; a rank's pairs are taken as spread evenly over its 32.
    """

    def route(tokens: int, generator: torch.Generator) -> Routed:
        layer_SPK = chosen[int(torch.randint(len(chosen), (1,), generator=generator))]
        first = int(torch.randint(layer_SPK.shape[1], (1,), generator=generator))
        flat_TK = layer_SPK.roll(-first, 1).transpose(0, 1).flatten(0, 1)
        rows = torch.arange(tokens) % len(flat_TK)
        rank_TK = flat_TK[rows] // (experts // RANKS)
        pairs_R = rank_TK.flatten().bincount(minlength=RANKS) * (TOP / rank_TK.shape[1])
        per_rank = EXPERTS // RANKS
        touched_R = per_rank * (1 - (1 - 1 / per_rank) ** pairs_R.double())
        received_R = torch.nn.functional.one_hot(rank_TK, RANKS).amax(1).sum(0)
        return Routed(pairs_R.tolist(), touched_R.tolist(), float(touched_R.sum()), received_R.tolist())

    return route


def demo_choices() -> tuple[list[torch.Tensor], int]:
    """What the demo model chooses on its held-out text: a tensor [sequences, positions, K] for each layer."""
    from lightship.causal_lm import load_causal_lm, load_tokenizer
    from lightship.recipe import load_recipe
    from lightship.text import read_sequences

    path = ROOT / "demo" / "checkpoint"
    recipe = load_recipe(ROOT / "recipes" / "demo.toml")
    tokenizer = load_tokenizer(path)
    ids = torch.stack([s for source in recipe.fidelity.sources for s in read_sequences(source, tokenizer, 4096, 256)])
    model = load_causal_lm(path)
    chosen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            module.register_forward_pre_hook(lambda _, args, name=name: chosen.setdefault(name, []).append(args[1]))
    with torch.inference_mode():
        for batch in ids.split(8):
            model(batch, use_cache=False)
    shape = (*ids.shape, -1)
    return [torch.cat(parts).view(shape) for parts in chosen.values()], model.config.n_routed_experts


# A step, a prompt, a minute.


def layer_us(way: str, tokens: int, routed: Routed, tp: Kernel, ep: Kernel) -> float:
    """One layer of one step, microseconds; `way` is `tp`, `ep` or `ep, all-to-all`."""
    other = CONSTANTS.other_us + CONSTANTS.other_us_a_token * tokens
    if way == "tp":
        experts = tp.time(tokens * TOP, routed.touched_at_all)
    else:
        experts = max(ep.time(p, t) for p, t in zip(routed.pairs, routed.touched, strict=True))
    return other + experts + exchange_us(way, tokens, routed)


def exchange_us(way: str, tokens: int, routed: Routed) -> float:
    """What moves between ranks for one layer's experts, microseconds.

    SGLang's `--tp 8` and `--tp 8 --ep 8` both all-reduce bf16 hidden states: 2 x 7/8 of them through each rank. With an
    all-to-all, tokens come in FP8 to the ranks that have their experts and go back in bf16; the fullest rank decides.
    """
    per_us = CONSTANTS.nvlink_gb_s * 1e3
    if way == "ep, all-to-all":
        moved = max(routed.received) * HIDDEN * (1 + 2) * (RANKS - 1) / RANKS
        return 2 * CONSTANTS.exchange_latency_us + moved / per_us
    return CONSTANTS.exchange_latency_us + 2 * (RANKS - 1) / RANKS * tokens * HIDDEN * 2 / per_us


def simulate(router: Router, tp: Kernel, ep: Kernel) -> dict[str, Any]:
    """Times of steps, time to the first token and queries a minute, each way of serving under this routing."""
    generator = torch.Generator().manual_seed(0)
    sizes = (*CONCURRENCIES, CONSTANTS.prompt_tokens)
    draws = {size: [router(size, generator) for _ in range(STEPS)] for size in sizes}
    ways = ("tp", "ep", "ep, all-to-all")
    step_ms = {
        way: {
            size: LAYERS * sum(layer_us(way, size, routed, tp, ep) for routed in draws[size]) / STEPS / 1e3
            for size in sizes
        }
        for way in ways
    }
    result: dict[str, Any] = {
        "imbalance": {size: _mean(max(r.pairs) * RANKS / sum(r.pairs) for r in draws[size]) for size in sizes},
        "touched": {size: _mean(r.touched_at_all for r in draws[size]) for size in sizes},
        "step_ms": {way: {size: round(ms, 3) for size, ms in step_ms[way].items()} for way in ways},
        "ttft_ms": {way: round(step_ms[way][CONSTANTS.prompt_tokens], 2) for way in ways},
        "queries_per_minute": {
            concurrency: {way: round(queries_per_minute(step_ms[way], concurrency), 1) for way in ways}
            for concurrency in CONCURRENCIES
        },
    }
    for other in ways[1:]:
        result[f"tp against {other}"] = {
            "ttft": round(result["ttft_ms"]["tp"] / result["ttft_ms"][other] - 1, 4),
            "queries_per_minute": {
                c: round(q["tp"] / q[other] - 1, 4) for c, q in result["queries_per_minute"].items()
            },
        }
    return result


def queries_per_minute(step_ms: dict[int, float], concurrency: int) -> float:
    """A steady load: `concurrency` queries need as many prompts, one step each, and together `output_tokens` steps."""
    cycle_ms = concurrency * step_ms[CONSTANTS.prompt_tokens] + CONSTANTS.output_tokens * step_ms[concurrency]
    return 60_000 * concurrency / cycle_ms


def _mean(values: Any) -> float:
    found = list(values)
    return round(sum(found) / len(found), 3)


# What is written.


def run_simulation(times: Path, engines: list[str]) -> None:
    """Simulate every routing with every engine's kernels and write tp_vs_ep.json and tp_vs_ep.md."""
    from lightship.files import write_json

    kernels = {engine: read_kernels(times, engine) for engine in engines}
    measured = json.loads(times.read_text())
    routers = {f"Zipf {skew}": zipf_router(skew) for skew in ZIPF} | {"demo model": demo_router(*demo_choices())}
    result = {
        "command": COMMAND,
        "date": datetime.now(UTC).date().isoformat(),
        "simulation": True,
        "times": f"{times.name}: {measured['device']}, SGLang {measured['sglang']}, {measured['date']}",
        "constants": asdict(CONSTANTS),
        "engines": {
            engine: {
                "kernels": {
                    name: asdict(kernel) | {"us_an_expert": kernel.us_an_expert}
                    for name, kernel in (("tp", tp), ("ep", ep))
                },
                "routing": {name: simulate(router, tp, ep) for name, router in routers.items()},
            }
            for engine, (tp, ep) in kernels.items()
        },
    }
    write_json(OUT / "tp_vs_ep.json", result)
    render(OUT)


def render(folder: Path) -> None:
    """Write tp_vs_ep.md from tp_vs_ep.json."""
    from lightship.files import write_text

    page = report(json.loads((folder / "tp_vs_ep.json").read_text()))
    write_text(folder / "tp_vs_ep.md", page)
    print(page)


def report(result: dict[str, Any]) -> str:
    """The result, as the file has it, as a page with the arithmetic."""
    c, mid, engines = CONSTANTS, MIDDLE, result["engines"]
    first = next(iter(engines))
    shown = engines[first]["routing"]["Zipf 0.5"]
    ttft, step = shown["ttft_ms"]["ep"], shown["step_ms"]["ep"][mid]
    queries = 60_000 * int(mid) / (int(mid) * ttft + c.output_tokens * step)
    prices = "; ".join(
        f"{engine} {tp['us_an_expert']:.2f} us at TP-8, {ep['us_an_expert']:.2f} at EP-8"
        for engine, tp, ep in _both(engines)
    )
    tables = "\n\n".join(f"## {engine}\n\n{_table(found['routing'])}" for engine, found in engines.items())
    findings = "\n".join(finding(engine, found) for engine, found in engines.items())
    return f"""# TP-8 against EP-8: a simulation

`{result["command"]}`, {result["date"]}. **Not a measurement of eight GPUs.**

- Measured, on one GPU and with even routing: the times of one MoE layer on one rank
  ({result["times"]}).
- Simulated, on the {LAYERS} MoE layers of DeepSeek-V3: the routing, the ranks that wait for the fullest, the exchange
  between them, the rest of the model, and prompts of {c.prompt_tokens} tokens with answers of {c.output_tokens}.

A negative TTFT and positive queries a minute speak for TP.

{tables}

## Is the reference reproduced?

The reference reports TTFT {REFERENCE_TTFT:+.0%} and queries a minute {REFERENCE_QUERIES:+.0%} for TP over EP.
Within {NEAR * 100:.0f} points of both, at concurrency {mid}:

{findings}

Two things are in these figures. EP waits for its fullest rank, which costs it more the more uneven the router is, with
every engine. And the kernels themselves may be faster at one shard, which no routing changes: at {mid} tokens
{_at_middle(engines)}.
Where an engine's kernels are faster at EP-8, TP starts from behind.

How uneven the reference's routing was is not known here, nor are its engine, GPUs and load. So agreement at some Zipf
law shows that the mechanism is large enough, not that it is the cause.

## The arithmetic, and what is assumed

- A rank's time for its experts: the measured time at its number of (token, expert) pairs, by straight lines, less the
  price of each expert that uniform routing would have touched and this did not:
  {prices}.
- A layer: {c.other_us:g} us and {c.other_us_a_token:g} us a token for all but the routed experts; the experts of the
  slowest rank; the exchange, {c.exchange_latency_us:g} us and 2 x 7/8 x tokens x {HIDDEN} x 2 bytes
  at {c.nvlink_gb_s:g} GB/s. That is the same for `--tp 8` and `--tp 8 --ep 8`, which both all-reduce. By all-to-all:
  twice the latency, and the fullest rank's tokens in FP8 and back in bf16. These four numbers are assumed.
- TTFT: {LAYERS} layers of a step with the whole prompt. Queries a minute at concurrency C: 60000 C / (C x TTFT +
  {c.output_tokens} x a step of C tokens). For EP, {first}, Zipf 0.5, C = {mid}:
  60000 x {mid} / ({mid} x {ttft:.2f} + {c.output_tokens} x {step:.2f}) = {queries:.1f}.
- Zipf s: the k-th most wanted of 256 experts is wanted as 1/k^s, in a new order for each of {STEPS} draws; top 8 of the
  best 4 of 8 groups. `demo model`: the experts that it chose on held-out text, two of its 16 on each rank.

What is left out: EPLB, which moves experts to even the load; the router's bias, by which DeepSeek-V3 evened it in
training; overlap of exchange and compute; waiting in queues. The real comparison, where eight GPUs are:
`python -m benchmarks.tp_vs_ep real CHECKPOINT`.
"""


def finding(engine: str, found: dict[str, Any]) -> str:
    """Which routings reproduce the reference with an engine's kernels."""
    pairs = {
        name: (r["tp against ep"]["ttft"], r["tp against ep"]["queries_per_minute"][MIDDLE])
        for name, r in found["routing"].items()
    }
    near = [
        f"{name} ({ttft:+.1%}, {queries:+.1%})"
        for name, (ttft, queries) in pairs.items()
        if abs(ttft - REFERENCE_TTFT) <= NEAR and abs(queries - REFERENCE_QUERIES) <= NEAR
    ]
    if near:
        return f"- {engine}: **reproduced** by {', '.join(near)}, and by none of the others."
    most = min(pairs, key=lambda name: pairs[name][0])
    return (
        f"- {engine}: **not reproduced** by any; {most} comes nearest, {pairs[most][0]:+.1%} and {pairs[most][1]:+.1%}."
    )


def _at_middle(engines: dict[str, Any]) -> str:
    return ", ".join(
        f"{engine} takes {tp['us'][MIDDLE]:.0f} us at TP-8 and {ep['us'][MIDDLE]:.0f} at EP-8"
        for engine, tp, ep in _both(engines)
    )


def _both(engines: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """An engine's name, and its kernels at TP-8 and at EP-8."""
    for engine, found in engines.items():
        yield engine, found["kernels"]["tp"], found["kernels"]["ep"]


def _table(routing: dict[str, Any]) -> str:
    mid = MIDDLE
    heads = [
        "routing",
        f"fullest rank over mean: {mid} tokens",
        "prompt",
        "TTFT ms: TP",
        "EP",
        "TP over EP: TTFT",
        *(f"queries/min at {n}" for n in CONCURRENCIES),
        f"at {mid}, EP by all-to-all",
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    return "\n".join([*lines, *(_row(name, found) for name, found in routing.items())])


def _row(name: str, found: dict[str, Any]) -> str:
    mid, against = MIDDLE, found["tp against ep"]
    cells = [
        name,
        f"{found['imbalance'][mid]:.2f}",
        f"{found['imbalance'][str(CONSTANTS.prompt_tokens)]:.2f}",
        f"{found['ttft_ms']['tp']:.1f}",
        f"{found['ttft_ms']['ep']:.1f}",
        f"{against['ttft']:+.1%}",
        *(f"{against['queries_per_minute'][str(n)]:+.1%}" for n in CONCURRENCIES),
        f"{found['tp against ep, all-to-all']['queries_per_minute'][mid]:+.1%}",
    ]
    return f"| {' | '.join(cells)} |"


# The real thing.


def compare_servers(checkpoint: Path, work: Path, seconds: float) -> None:
    """Serve `checkpoint` by `--tp 8`, then by `--tp 8 --ep 8`, under the same loads, and write tp_vs_ep_real.json."""
    from benchmarks import sglang_server as server

    for name, flags in (("tp-8", ("--tp", "8")), ("ep-8", ("--tp", "8", "--ep", "8"))):
        server.CONFIGURATIONS[name] = server.Configuration(
            str(checkpoint.resolve()), (*flags, "--quantization", "w4afp8"), {"LIGHTSHIP_MOE": "on"}, name
        )
        flags = ["--trust-remote-code", "--host", "127.0.0.1", "--disable-radix-cache"]
        deadline = time.monotonic() + seconds
        with server.serving(work, [name], flags, deadline) as servers:
            result = server.Result(name, flags, servers, OUT / "tp_vs_ep_real.json")
            server.measure_speed(work, servers, list(CONCURRENCIES), deadline, result)
            result.show()


def main() -> None:
    """Simulate, or compare real servers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    sub = steps.add_parser("simulate")
    sub.add_argument("--times", type=Path, default=TIMES, help="measured kernel times (default: %(default)s)")
    sub.add_argument("--engines", nargs="+", default=list(ENGINES), help="whose kernels (default: %(default)s)")
    steps.add_parser("render")
    sub = steps.add_parser("real")
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument("--work", type=Path, default=Path("tp_vs_ep_work"))
    sub.add_argument("--seconds", type=float, default=3600, help="for each server (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.step == "simulate":
        run_simulation(arguments.times, arguments.engines)
    elif arguments.step == "render":
        render(OUT)
    else:
        arguments.work.mkdir(parents=True, exist_ok=True)
        compare_servers(arguments.checkpoint, arguments.work.absolute(), arguments.seconds)


if __name__ == "__main__":
    main()
