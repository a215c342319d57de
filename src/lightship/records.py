"""The records of a release: what each stage hands to the next, immutable, and JSON on disk.

    Checkpoint -> Plan -> Calibration -> Quantized -> Verification -> Staged -> Accuracy -> Fidelity -> Throughput
               -> Comparison -> Verdict -> Promoted

Units: bytes, seconds, milliseconds where the name says so; fractions (accuracy, agreement, errors) are 0 to 1.
"""

from typing import Literal

import msgspec

Action = Literal["int4", "fp8", "keep"]
Decision = Literal["pass", "fail", "inconclusive"]
Against = Literal["limit", "source", "champion"]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every record."""


class PlannedTensor(Record, frozen=True, kw_only=True):
    """One tensor of the source: what becomes of it and what it then weighs, its new scales included."""

    name: str
    action: Action
    converted: bool
    """The source holds this linear in 16 or 32 bits, and we make its FP8 blocks; other `fp8` tensors stay as they
    are."""
    part: str
    """Of the model: routed experts, attention, …; see `lightship.weights.Part`."""
    dtype: str
    shape: list[int]
    bytes_before: int
    bytes_after: int


class Fit(Record, frozen=True, kw_only=True):
    """The result on GPUs of one size."""

    gpu: str
    tp: int
    usable_bytes: int
    """Of one GPU, less what the runtime keeps for itself."""
    weight_bytes: int
    """On one GPU: its shards, and whole what is not divided."""
    cache_bytes_per_token: int
    """Of the KV cache on one GPU, in bf16."""

    @property
    def room(self) -> int:
        """Bytes on one GPU for the KV cache; negative: it does not fit."""
        return self.usable_bytes - self.weight_bytes

    @property
    def cache_tokens(self) -> int:
        return max(self.room, 0) // self.cache_bytes_per_token


class Plan(Record, frozen=True, kw_only=True):
    """What quantization will do to every tensor."""

    source: str
    tensors: list[PlannedTensor]
    expert_layers: list[str]
    tensor_parallel: list[int]
    """Degrees that divide the routed experts, all that `local` asks; see `Degree` for the other parts, and SGLang."""
    fits: list[Fit] = []
    """The result on eight GPUs of each size; a release has it worked out."""

    @property
    def bytes_before(self) -> int:
        return sum(t.bytes_before for t in self.tensors)

    @property
    def bytes_after(self) -> int:
        return sum(t.bytes_after for t in self.tensors)

    @property
    def experts_before(self) -> int:
        return sum(t.bytes_before for t in self.tensors if t.action == "int4")

    @property
    def experts_after(self) -> int:
        return sum(t.bytes_after for t in self.tensors if t.action == "int4")

    @property
    def experts_shrink(self) -> float:
        """The fraction of the routed experts' bytes that is saved."""
        return 1 - self.experts_after / self.experts_before


class Part(Record, frozen=True, kw_only=True):
    """What one part of the model weighs before and after."""

    part: str
    tensors: int
    bytes_before: int
    bytes_after: int


class Degree(Record, frozen=True, kw_only=True):
    """A degree of tensor parallelism, and what stands in its way."""

    tp: int
    obstacles: dict[str, list[str]]
    """Part of the model -> its linears that cannot be cut into whole heads, groups of 128 or 128x128 blocks, one of
    each kind with the reason; empty for a part that divides."""

    @property
    def possible(self) -> bool:
        return not self.all_obstacles

    @property
    def all_obstacles(self) -> list[str]:
        """Of all parts."""
        return [obstacle for part in self.obstacles.values() for obstacle in part]


class Need(Record, frozen=True, kw_only=True):
    """Something that quantization needs of this machine."""

    what: str
    needed: int
    available: int
    arithmetic: str

    @property
    def enough(self) -> bool:
        return self.needed <= self.available


class Probe(Record, frozen=True, kw_only=True):
    """What was measured of this machine, on this checkpoint."""

    device: str
    read_bytes: int
    read_seconds: float
    flops: float
    """Of a matrix product a second, in the dtype that the blocks are computed in."""
    expert_seconds: float
    """To read nothing and round one expert at its true shape."""
    expert_arithmetic: str
    seconds: float

    @property
    def read_bandwidth(self) -> float:
        """Bytes a second."""
        return self.read_bytes / self.read_seconds


class Duration(Record, frozen=True, kw_only=True):
    """A part of the estimated time."""

    what: str
    seconds: float
    arithmetic: str


class Preflight(Record, frozen=True, kw_only=True):
    """Whether a checkpoint can be quantized on this machine, what comes out, how long it takes, and what it costs."""

    source: str
    model_type: str
    tensors: int
    unexpected: list[str]
    mtp_declared: int
    mtp_found: int
    parts: list[Part]
    degrees: list[Degree]
    fits: list[Fit]
    calibration_tokens: dict[str, int]
    """Scene -> tokens that its text gives, read as the quantization will; empty without a recipe."""
    needs: list[Need]
    probe: Probe | None
    durations: list[Duration]
    """Of the whole work; disk and processor work at the same time."""
    seconds: float | None
    """Estimated for what is not done yet; null without a probe."""
    price: float | None
    """Of that time at `gpu_hour`."""
    gpu_hour: float
    experts: int
    experts_done: int
    problems: list[str]
    """Why it cannot work, and what to change."""
    notes: list[str]
    planned: list[PlannedTensor]
    """Every tensor, if asked for."""

    @property
    def tensor_parallel(self) -> list[int]:
        """Degrees at which SGLang can serve the result: it divides the other linears too, `local` the experts alone."""
        return [degree.tp for degree in self.degrees if degree.possible]

    @property
    def bytes_before(self) -> int:
        return sum(part.bytes_before for part in self.parts)

    @property
    def bytes_after(self) -> int:
        return sum(part.bytes_after for part in self.parts)


class InputScale(Record, frozen=True, kw_only=True):
    """The static FP8 scale of the inputs of w1 and w3, or of w2, one for all experts of a layer."""

    scale: float
    """Representable in bf16, which is all that SGLang keeps of it."""
    amax: float
    """The largest absolute input."""
    percentile: float
    """The scale covers this share of the inputs, in percent; the rest saturates. 100: none does."""
    error: float
    """Relative squared error of rounding all inputs to FP8 at this scale."""
    error_at_amax: float
    """The same at the scale that covers every input."""
    outliers: bool
    """The error, or that of the smaller 99.9 % alone, is more than twice FP8's own: outliers stretch the scale, so
    static activations will cost accuracy."""


class ExpertRounding(Record, frozen=True, kw_only=True):
    """How one expert was rounded, and how well."""

    expert: int
    tokens: int
    """Of the calibration text that were routed to it."""
    how: str
    """`gptq`; `gptq, topped up` with the layer's tokens, because it saw fewer than the floor; `mse, no tokens`; …"""
    w13_error: float
    w2_error: float
    """Relative squared error of the weights, ||w - w'||² / ||w||²."""
    w13_output_error: float | None
    w2_output_error: float | None
    """Relative squared error of the outputs on the calibration tokens; null without a Hessian."""


class LayerCalibration(Record, frozen=True, kw_only=True):
    """What one layer's experts saw, and what became of them."""

    layer_name: str
    w13_input: InputScale
    w2_input: InputScale
    expert_tokens: dict[str, list[int]]
    """Scene -> tokens routed to each expert."""
    experts: list[ExpertRounding]

    def tokens_of_experts(self) -> list[int]:
        return [sum(counts) for counts in zip(*self.expert_tokens.values(), strict=True)]

    def starved(self, floor: int) -> list[int]:
        """The experts that saw fewer tokens than `floor`."""
        return [expert for expert, tokens in enumerate(self.tokens_of_experts()) if tokens < floor]


class Calibration(Record, frozen=True, kw_only=True):
    """What the calibration text did in the model, layer by layer, and how each expert was rounded."""

    text_digest: str
    tokens: dict[str, int]
    """Scene -> tokens."""
    token_floor: int
    layers: list[LayerCalibration]

    @property
    def starved(self) -> list[str]:
        """Experts that saw fewer tokens than the floor: `model.layers.3.mlp.experts.7`."""
        return [f"{x.layer_name}.experts.{e}" for x in self.layers for e in x.starved(self.token_floor)]

    @property
    def without_tokens(self) -> list[str]:
        """Experts that calibration never reached, rounded by the MSE grid."""
        return [f"{x.layer_name}.experts.{e}" for x in self.layers for e in x.starved(1)]

    @property
    def with_outliers(self) -> list[str]:
        """Layers whose static input scales are stretched by outliers."""
        return [x.layer_name for x in self.layers if x.w13_input.outliers or x.w2_input.outliers]


class LayerError(Record, frozen=True, kw_only=True):
    """Relative squared error ||w - w'||² / ||w||² of a layer's experts after rounding."""

    layer_name: str
    w13: float
    w2: float


class Quantized(Record, frozen=True, kw_only=True):
    """A written W4AFP8 checkpoint."""

    path: str
    method: str
    manifest_digest: str
    bytes_total: int
    experts: int
    experts_resumed: int
    """Of them, how many an earlier run of the same command had finished."""
    seconds: float


class Check(Record, frozen=True, kw_only=True):
    """One question asked of a written checkpoint, and its answer."""

    name: str
    passed: bool
    detail: str
    warned: bool = False
    """Something was found that is served, but that a person should know of; it fails nothing."""
    findings: list[str] = []
    """The first hundred faults and warnings, faults first."""
    found: int = 0
    """How many there are."""

    @property
    def outcome(self) -> Literal["pass", "warn", "fail"]:
        return ("warn" if self.warned else "pass") if self.passed else "fail"


class Verification(Record, frozen=True, kw_only=True):
    """Whether a checkpoint is what SGLang's loader needs it to be."""

    path: str
    source: str | None = None
    """What it was compared with."""
    checks: list[Check]
    layers: list[LayerError]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


class Staged(Record, frozen=True, kw_only=True):
    """A served checkpoint: what was launched, from which manifest, and that it answered."""

    engine: str
    base_url: str
    command: list[str]
    tensor_parallel: int
    manifest_digest: str
    ready_seconds: float
    greeting: str
    """The text of the first greedy completion."""


class AnsweredQuestion(Record, frozen=True, kw_only=True):
    """One question of an evaluation and the model's answer to it."""

    question_id: str
    category: str
    answer: str
    predicted: str | None
    """The extracted letter; None if no answer could be read from the text."""
    correct: bool
    truncated: bool
    """The text was cut by the token limit, or the model never stopped thinking."""
    text: str
    """What the task's filter read: without the thinking, if the recipe says that the model reasons."""
    prompt_digest: str = ""
    """SHA-256 of the prompt."""


class TaskSample(Record, frozen=True, kw_only=True):
    """One document of a further task, and what became of it."""

    task: str
    """Of a group, the task that it belongs to."""
    document: int
    prompt_digest: str
    target: str
    answers: list[str]
    """A text a request; of a choice, the log-probability of each option."""
    parsed: dict[str, str]
    """Filter -> what it read of the answers."""
    metrics: dict[str, float]
    """`metric/filter` -> value of this document."""
    truncated: bool


class TaskResult(Record, frozen=True, kw_only=True):
    """lm-eval's result on one further task, with every sample."""

    task: str
    metrics: dict[str, float]
    """`metric/filter`, before it the task if it is one of a group, -> value over all documents."""
    samples: list[TaskSample]
    overrides: dict[str, str]
    """Settings that differ from the stock task's."""

    @property
    def truncated(self) -> float:
        return sum(s.truncated for s in self.samples) / len(self.samples)


class Agreement(Record, frozen=True, kw_only=True):
    """Source and quantized model's greedy answers to the same questions, side by side."""

    questions: int
    same_answer: float
    """Share of questions with the same parsed letter, or none in both."""
    same_text: float
    """Share of questions with the same text to the last character."""
    common_prefix: float
    """Mean characters before the two texts part."""
    common_share: float
    """Mean of the same as a share of the longer text; 1 for the same text."""


class Accuracy(Record, frozen=True, kw_only=True):
    """lm-eval's result on a set of questions, with every answer."""

    task: str
    answers: list[AnsweredQuestion]
    overrides: dict[str, str]
    """Settings that differ from the stock task's."""
    seconds: float
    """Of the run that finished it; an interrupted one has answered some of the questions before."""
    tasks: list[TaskResult] = []
    """The recipe's further tasks."""
    planned: int | None = None
    """Where questions were asked in stages until it was settled: how many would have been asked in all."""

    @property
    def accuracy(self) -> float:
        return sum(a.correct for a in self.answers) / len(self.answers)

    @property
    def truncated(self) -> float:
        return sum(a.truncated for a in self.answers) / len(self.answers)

    @property
    def unparsed(self) -> float:
        return sum(a.predicted is None for a in self.answers) / len(self.answers)

    def by_category(self) -> dict[str, tuple[int, int]]:
        """Category -> (correct, asked)."""
        counts: dict[str, tuple[int, int]] = {}
        for a in self.answers:
            correct, asked = counts.get(a.category, (0, 0))
            counts[a.category] = (correct + a.correct, asked + 1)
        return dict(sorted(counts.items()))


class SceneFidelity(Record, frozen=True, kw_only=True):
    """How close the quantized model's next-token distributions are to the source's on one scene's held-out text."""

    scene: str
    tokens: int
    kl: float
    """Mean KL(source || quantized) a token, in nats."""
    top1_agreement: float
    perplexity_source: float
    perplexity_quantized: float
    kl_by_layer: list[float] = []
    """The same of what each layer's output predicts through the final norm and head; the last is `kl`."""


class Fidelity(Record, frozen=True, kw_only=True):
    """Same-model measures on held-out text."""

    scenes: list[SceneFidelity]
    seconds: float
    text_digest: str = ""
    """SHA-256 of the text's rows."""
    activations: str = "dynamic"
    """How the quantized model's were rounded to FP8."""

    @property
    def kl(self) -> float:
        """Mean over all tokens."""
        return sum(s.kl * s.tokens for s in self.scenes) / sum(s.tokens for s in self.scenes)

    @property
    def top1_agreement(self) -> float:
        return sum(s.top1_agreement * s.tokens for s in self.scenes) / sum(s.tokens for s in self.scenes)

    @property
    def kl_by_layer(self) -> list[float]:
        """Mean over all tokens, of each layer; empty if it was not measured."""
        tokens = sum(s.tokens for s in self.scenes)
        by_layer = zip(*(s.kl_by_layer for s in self.scenes), strict=True)
        return [sum(kl * s.tokens for kl, s in zip(of, self.scenes, strict=True)) / tokens for of in by_layer]


class Percentiles(Record, frozen=True, kw_only=True):
    """Of a latency, in milliseconds."""

    p50: float
    p90: float
    p99: float


class Lateness(Record, frozen=True, kw_only=True):
    """How much later than due the requests left this machine, in milliseconds."""

    p50: float
    p99: float
    max: float


class Slo(Record, frozen=True, kw_only=True):
    """What a request must keep to count as good; null does not bind."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None


class Goodput(Record, frozen=True, kw_only=True):
    """Requests that were answered within the limits."""

    slo: Slo
    share: float
    """Of all timed requests; one that failed is not good."""
    queries_per_minute: float


class Figures(Record, frozen=True, kw_only=True):
    """What one server did with one load, its warm-up left out. docs/throughput.md defines each."""

    requests: int
    errors: int
    seconds: float
    queries_per_minute: float
    output_tokens_per_second: float
    time_to_first_token_ms: Percentiles
    time_per_output_token_ms: Percentiles
    input_tokens_per_second: float | None = None
    """Null, as the two latencies below, in records of a time when it was not measured."""
    inter_token_latency_ms: Percentiles | None = None
    end_to_end_ms: Percentiles | None = None
    errors_by_kind: dict[str, int] = {}
    short_answers: int = 0
    """Answers of fewer tokens than were asked for."""
    warmup_requests: int = 0
    """Requests before those that are counted."""
    lateness_ms: Lateness | None = None
    """Null where requests have no due time: fixed concurrency."""
    goodput: Goodput | None = None


class Load(Figures, frozen=True, kw_only=True):
    """One server under one fixed concurrency."""

    server: Literal["source", "quantized"]
    concurrency: int


class Lengths(Record, frozen=True, kw_only=True):
    """Of prompts or of answers, in tokens."""

    p50: float
    p90: float
    max: int
    total: int


class Workload(Record, frozen=True, kw_only=True):
    """Which requests were sent, and when."""

    arrivals: Literal["concurrency", "poisson", "trace"]
    name: str
    """For people: `8 requests in flight`, `Poisson, 5 a second, seed 0`, `conv.csv at speed 2`."""
    requests: int
    seconds: float | None
    """From the first due time to the last; null at fixed concurrency."""
    prompt_tokens: Lengths
    output_tokens: Lengths
    repeated_tokens: float
    """Share of the prompt tokens that a cache of all earlier prompts' prefixes would hold."""
    trace_digest: str | None = None
    """SHA-256 of the trace file."""
    length_factor: float = 1.0
    """All lengths of the trace were multiplied by this."""
    prompts_clipped: int = 0
    outputs_clipped: int = 0
    """How many were then cut, to fit `window` tokens."""
    window: int | None = None


class ServerFigures(Figures, frozen=True, kw_only=True):
    """One server's figures under a workload that is named beside it."""

    server: str


class LoadReport(Record, frozen=True, kw_only=True):
    """One workload, on one server or on several one after the other."""

    client: str
    """`lightship`, or the name of the tool that made the requests."""
    workload: Workload
    servers: list[ServerFigures]
    machine: str
    """Of the client."""
    date: str

    def ratio(self) -> float | None:
        """Queries a minute of the last server over the first's; null for one server."""
        first, last = self.servers[0], self.servers[-1]
        return last.queries_per_minute / first.queries_per_minute if first is not last else None


class Step(Record, frozen=True, kw_only=True):
    """One load of a saturation sweep."""

    load: float
    """Requests a second, or in flight."""
    sustained: bool
    why: str
    figures: Figures | None
    """Null if no request was answered."""


class Saturation(Record, frozen=True, kw_only=True):
    """How far one server can be loaded."""

    server: str
    highest: float
    """The largest load that was sustained; 0 if none was."""
    refused: float | None
    """The smallest larger one that was not; null if none was found up to the sweep's end."""
    steps: list[Step]
    """In the order in which they were run."""


class SweepReport(Record, frozen=True, kw_only=True):
    """The knee of one server, or of several measured in turns in one run."""

    unit: Literal["requests a second", "requests in flight"]
    criterion: str
    prompt_tokens: int
    output_tokens: int
    servers: list[Saturation]
    machine: str
    date: str

    def ratio(self) -> float | None:
        """The last server's highest load over the first's; null for one server, or if the first sustained none."""
        first, last = self.servers[0], self.servers[-1]
        return last.highest / first.highest if first is not last and first.highest else None


class Throughput(Record, frozen=True, kw_only=True):
    """Source and quantized servers under the same requests, measured in turns in one run."""

    prompt_tokens: int
    output_tokens: int
    loads: list[Load]
    machine: str
    arrivals: list[LoadReport] = []
    """Under the recipe's rate or trace, if it names one; source first."""

    def ratio(self, concurrency: int) -> float:
        """Queries a minute of the quantized server over the source's."""
        return (
            self.load("quantized", concurrency).queries_per_minute / self.load("source", concurrency).queries_per_minute
        )

    def load(self, server: str, concurrency: int) -> Load:
        return next(x for x in self.loads if x.server == server and x.concurrency == concurrency)

    @property
    def concurrencies(self) -> list[int]:
        return sorted({x.concurrency for x in self.loads})


class SubjectLoss(Record, frozen=True, kw_only=True):
    """Two models' answers to the questions of one subject, paired."""

    subject: str
    questions: int
    source_accuracy: float
    quantized_accuracy: float
    lost: int
    gained: int
    loss: float
    loss_low: float
    loss_high: float
    """The intervals of all subjects hold together at 95 %."""
    p_value: float
    """Exact one-sided McNemar test that as many are gained as lost."""
    p_adjusted: float
    """By Holm, for the number of subjects: if it is 0.05 or less, the subject is worse."""


class Comparison(Record, frozen=True, kw_only=True):
    """Two models' answers to the same questions, paired; the source, or the champion, against the quantized model."""

    questions: int
    source_accuracy: float
    quantized_accuracy: float
    lost: list[str]
    """Ids of questions that only the source answers correctly."""
    gained: list[str]
    loss: float
    """Source accuracy minus quantized accuracy: positive is worse."""
    loss_low: float
    loss_high: float
    """95 % confidence interval of the loss."""
    p_value: float
    """Exact McNemar test that lost and gained are equally likely."""
    subjects: list[SubjectLoss] = []
    """By name."""
    looks: list[int] = []
    """Where questions were asked in stages: how many were answered at each look. Empty: all were asked at once."""
    accuracy_at_looks: list[tuple[float, float]] = []
    """The source's and the quantized model's accuracy at each look, on what was answered by then."""
    planned: int | None = None
    """Where they were asked in stages: how many would have been asked in all."""


class RuleResult(Record, frozen=True, kw_only=True):
    """One rule of the gate, applied."""

    rule: str
    decision: Decision
    value: str
    limit: str
    explanation: str
    against: Against = "limit"
    """What the value was held against."""
    interval: str | None = None
    """Of the value, where it is an estimate."""
    arithmetic: str | None = None
    """How the decision follows from the counts."""
    more_questions: int | None = None
    """That would settle it, if it is inconclusive and the rates seen hold."""


class Verdict(Record, frozen=True, kw_only=True):
    """The gate's decision and the reason for each part of it."""

    decision: Decision
    rules: list[RuleResult]
    champion: str | None = None
    """The release that was champion, if rules compare with it; null: there was none, or no rule does."""

    @property
    def more_questions(self) -> int | None:
        """That would settle every inconclusive rule; null: nothing is inconclusive, or no number of questions would."""
        open_rules = [rule for rule in self.rules if rule.decision == "inconclusive"]
        needed = [rule.more_questions for rule in open_rules if rule.more_questions is not None]
        return max(needed) if needed and len(needed) == len(open_rules) else None


class Override(Record, frozen=True, kw_only=True):
    """A person's decision to promote in spite of the gate's."""

    by: str
    reason: str
    verdict: Decision
    """That it sets aside."""
    rules: list[str]
    """The rules that were not met."""
    at: str
    """UTC, ISO 8601."""


class Promoted(Record, frozen=True, kw_only=True):
    """The registered model version that now carries the alias `champion`."""

    model: str
    version: str
    alias: str
    manifest_digest: str
    previous_version: str | None
    override: Override | None = None
    """Null: the gate passed."""
