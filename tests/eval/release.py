"""A plausible release made of fake records, for tests of the gate and the report."""

import random
from typing import Any

from lightship.eval.agreement import measure_agreement
from lightship.eval.comparison import compare
from lightship.eval.gate import decide
from lightship.eval.measures import Evidence
from lightship.eval.questions import Question
from lightship.eval.report_data import ReportData
from lightship.policy import Gate
from lightship.records import (
    Accuracy,
    AnsweredQuestion,
    Calibration,
    Check,
    ExpertRounding,
    Fidelity,
    Fit,
    InputScale,
    LayerCalibration,
    LayerError,
    Load,
    Percentiles,
    Plan,
    PlannedTensor,
    Quantized,
    SceneFidelity,
    Staged,
    Throughput,
    Verification,
)

GATE = Gate(accuracy_loss=0.02, kl=0.05, truncated=0.02, unparsed=0.02, experts_shrink=0.4, throughput_ratio=1.0)
CATEGORIES = ("arithmetic", "facts", "logic", "reading", "sequences")


def accuracy(right: list[bool], *, text: str = "… the answer is (B).", **fields: Any) -> Accuracy:
    """An evaluation in which question i was answered correctly where `right[i]`."""
    answers = [
        AnsweredQuestion(
            question_id=str(i),
            category=CATEGORIES[i % len(CATEGORIES)],
            answer="B",
            predicted="B" if ok else "D",
            correct=ok,
            truncated=False,
            text=text if ok else text.replace("(B)", "(D)"),
        )
        for i, ok in enumerate(right)
    ]
    return Accuracy(
        **{"task": "questions", "answers": answers, "overrides": {"dataset": "x"}, "seconds": 61.0} | fields
    )


def plan(experts_after: int = 54_000_000) -> Plan:
    tensors: list[tuple[str, Any, str, int, int]] = [
        ("model.layers.1.mlp.experts.0.gate_proj.weight", "int4", "routed experts", 100_000_000, experts_after),
        ("model.layers.1.self_attn.o_proj.weight", "fp8", "attention", 8_000_000, 8_000_000),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", "fp8", "shared experts", 3_000_000, 3_000_000),
        ("model.embed_tokens.weight", "keep", "embeddings, head", 6_000_000, 6_000_000),
    ]
    planned = [
        PlannedTensor(
            name=n, action=a, converted=False, part=part, dtype="F8_E4M3", shape=[1, b], bytes_before=b, bytes_after=c
        )
        for n, a, part, b, c in tensors
    ]
    fit = Fit(gpu="80 GB (H100)", tp=8, usable_bytes=76_000_000, weight_bytes=9_000_000, cache_bytes_per_token=1000)
    layers = ["model.layers.1.mlp"]
    return Plan(source="demo/model", tensors=planned, expert_layers=layers, tensor_parallel=[1, 2, 8], fits=[fit])


def verification(passed: bool = True) -> Verification:
    checks = [
        Check(name="every tensor of the source is accounted for", passed=True, detail="1,204 tensors"),
        Check(name="every scale is finite and not zero", passed=passed, detail="96 of 96 layers"),
    ]
    rng = random.Random(3)
    layers = [
        LayerError(
            layer_name=f"model.layers.{i}.mlp", w13=0.011 + 0.002 * rng.random(), w2=0.012 + 0.003 * rng.random()
        )
        for i in range(1, 9)
    ]
    return Verification(path="out/checkpoint", checks=checks, layers=layers)


def fidelity(kl: float = 0.012) -> Fidelity:
    scenes = [
        SceneFidelity(
            scene=scene, tokens=4088, kl=kl * factor, top1_agreement=0.97 - 0.02 * factor,
            perplexity_source=4.1 * factor, perplexity_quantized=4.15 * factor,
            kl_by_layer=[kl * factor * (layer + 1) / 9 for layer in range(9)],
        )
        for scene, factor in (("code", 0.6), ("english prose", 1.3), ("questions", 1.0), ("chinese", 1.6))
    ]  # fmt: skip
    return Fidelity(scenes=scenes, seconds=9.2)


def throughput(ratio: float = 1.3) -> Throughput:
    def load(server: Any, concurrency: int, speed: float) -> Load:
        per_token = Percentiles(p50=31 / speed, p90=40 / speed, p99=61 / speed)
        first = Percentiles(p50=140 * concurrency**0.6 / speed, p90=190 * concurrency**0.6, p99=230 * concurrency**0.6)
        qpm = 52 * concurrency**0.7 * speed
        return Load(
            server=server, concurrency=concurrency, requests=32, errors=0, seconds=30 / speed, queries_per_minute=qpm,
            output_tokens_per_second=qpm * 32 / 60, time_to_first_token_ms=first, time_per_output_token_ms=per_token,
        )  # fmt: skip

    loads = [load(s, c, r) for c in (1, 4, 16) for s, r in (("source", 1.0), ("quantized", ratio))]
    return Throughput(prompt_tokens=256, output_tokens=32, loads=loads, machine="AMD EPYC 9B14, 8 cores")


def input_scale(amax: float) -> InputScale:
    return InputScale(
        scale=amax / 448, amax=amax, percentile=100.0, error=0.0006, error_at_amax=0.0006, outliers=False
    )  # fmt: skip


def rounding(expert: int, tokens: int, rng: random.Random) -> ExpertRounding:
    error = 0.012 + 0.003 * rng.random()
    output = error * 0.6 if tokens else None
    return ExpertRounding(
        expert=expert, tokens=tokens, how="gptq" if tokens else "mse, no tokens", w13_error=error,
        w2_error=1.2 * error, w13_output_error=output, w2_output_error=None if output is None else 1.3 * output,
    )  # fmt: skip


def calibration(layers: int = 8, experts: int = 32, starved: bool = True) -> Calibration:
    rng = random.Random(1)
    made = []
    for layer in range(1, layers + 1):
        counts = [int(rng.lognormvariate(6, 0.9)) + 1 for _ in range(experts)]
        if starved and layer == 3:
            counts[7] = 0
        half = [c // 2 for c in counts]
        made.append(
            LayerCalibration(
                layer_name=f"model.layers.{layer}.mlp",
                w13_input=input_scale(3.0), w2_input=input_scale(9.0),
                experts=[rounding(expert, tokens, rng) for expert, tokens in enumerate(counts)],
                expert_tokens={"code": half, "prose": [c - h for c, h in zip(counts, half, strict=True)]},
            )
        )  # fmt: skip
    return Calibration(text_digest="b71c" * 16, tokens={"code": 16384, "prose": 16384}, token_floor=256, layers=made)


def evidence(**changed: Any) -> Evidence:
    """What a gate reads of a good release, but for what is changed."""
    answers = accuracy([True] * 1000)
    made: dict[str, Any] = {
        "release_id": "5f2c9e1b7ad3", "plan": plan(), "calibration": calibration(starved=False),
        "verification": verification(), "source": answers, "quantized": answers, "fidelity": fidelity(),
        "throughput": throughput(),
    } | changed  # fmt: skip
    if "comparison" not in made:
        made["comparison"] = compare(made["source"], made["quantized"])
    return Evidence(**made)


def release(
    *, losing: float = 0.02, questions: int = 700, text: str = "… the answer is (B).", seed: int = 0, **measured: Any
) -> ReportData:
    """A whole release whose quantized model loses about `losing` of the questions and gains half as many."""
    rng = random.Random(0)
    right = [rng.random() < 0.8 for _ in range(questions)]
    rng = random.Random(seed) if seed else rng
    kept = [(ok and rng.random() >= losing / 0.8) or (not ok and rng.random() < losing / 0.4) for ok in right]
    source, quantized = accuracy(right, text=text), accuracy(kept, text=text)
    made = {"plan": plan(), "verification": verification(), "fidelity": fidelity(), "throughput": throughput()}
    made |= measured
    seen = evidence(source=source, quantized=quantized, **made)
    question = Question(
        question_id=0, question="What comes next: 17 20 25 32?", options=["44", "41", "32", "39"], answer="B",
        cot_content="", category="sequences",
    )  # fmt: skip
    return ReportData(
        release_id="5f2c9e1b7ad34c60" * 4,
        model="demo", recipe="recipes/demo.toml",
        source="lightship/demo-moe@4e1c2f7",
        source_digest="9d1e" * 16,
        calibration=calibration(),
        quantized=Quantized(
            path="out/checkpoint", method="gptq", manifest_digest="c0ffee42" * 8, bytes_total=71_300_000,
            experts=64, experts_resumed=0, seconds=31.0,
        ),
        staged=Staged(
            engine="local", base_url="http://127.0.0.1:8000",
            command=["lightship", "serve", "out/checkpoint", "--tp", "2"],
            tensor_parallel=2, manifest_digest="c0ffee42" * 8, ready_seconds=4.2, greeting="The lighthouse keeper said",
        ),
        source_accuracy=source,
        quantized_accuracy=quantized,
        comparison=seen.comparison,
        verdict=decide(GATE, seen),
        agreement=measure_agreement(source, quantized),
        versions={"lightship": "0.1.0+b238681", "torch": "2.13.0", "transformers": "5.23.0", "lm-eval": "0.4.13"},
        next_commands=["lightship promote 5f2c9e1b7ad3", "lightship serve out/checkpoint --tp 2 --port 8000"],
        questions=dict.fromkeys(seen.comparison.lost, question),
        **made,  # type: ignore[arg-type]
    )  # fmt: skip
