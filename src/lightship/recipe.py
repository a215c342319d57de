"""A recipe: one TOML file that says how a release is made. Every setting that changes the result is here, none
elsewhere.

Paths in a recipe are relative to the recipe's own folder. An unknown key is an error, never ignored.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from lightship.errors import RecipeError
from lightship.policy import Gate, check_gate
from lightship.section import Positive, Section, Share, read_toml

Method = Literal["absmax", "mse", "gptq"]
T = TypeVar("T", bound="Section")
HUB_QUESTIONS = "TIGER-Lab/MMLU-Pro"
HUB_NAME = "mmlu_pro"
"""What the Hub's questions are called; the stock lm-eval task's own name."""
ADDRESS = re.compile(r"\w+://\S+:\d{1,5}")


class TextSource(Section, frozen=True, kw_only=True):
    """Text of a scene: local files, or a Hugging Face dataset. Several sources may share a scene.

    A row has `text`, or `messages` (and perhaps `tools`) for the model's chat template.
    """

    scene: str
    path: str | None = None
    """A .jsonl, .txt, .md or .parquet file, or a folder of these, read in the order of their names."""
    dataset: str | None = None
    """A dataset's name on the Hub, or a local dataset folder (starts with `.` or `/`)."""
    config: str | None = None
    revision: str | None = None
    """A commit of the dataset; a branch moves, and with it the release id."""
    split: str | None = None
    """`train` if absent."""
    column: str | None = None
    """The column that holds the text (strings) or the messages (lists); `messages` or `text` if absent."""
    weight: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    """The source gives this many times `tokens_per_scene` tokens."""
    thinking: bool | None = None
    """Tell the chat template to think or not to; with `false`, reasoning in the rows is left out."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise ValueError(f"the source of scene {self.scene!r} needs exactly one of path and dataset")
        if self.path is not None and (self.config or self.revision or self.split):
            raise ValueError(f"the source of scene {self.scene!r}: config, revision and split belong to a dataset")

    def share(self, tokens_per_scene: int) -> int:
        """Tokens that it is asked for."""
        return round(tokens_per_scene * self.weight)


class RoundingSettings(Section, frozen=True, kw_only=True):
    """How a float weight becomes int4 with a scale for each group of 128 inputs."""

    method: Method = "gptq"
    signed_scales: bool = True
    """Let a group's scale be negative, so that its largest weight can use the -8 end of int4."""
    damping: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.01
    """GPTQ adds this fraction of the Hessian's mean diagonal to its diagonal."""
    sweeps: Annotated[int, msgspec.Meta(ge=0, le=16)] = 2
    """After GPTQ, go over all columns this many times and round each anew, given all the others."""


class Rule(RoundingSettings, frozen=True, kw_only=True):
    """Other settings for some of the experts: those of named layers, or those whose error came out too large."""

    layers: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    """Numbers of the layers, as in the tensors' names."""
    output_error_above: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Round a weight anew by this rule if the relative squared error of its outputs on the calibration tokens is above
    this; the better of the two is kept."""

    def __post_init__(self) -> None:
        if (self.layers is None) == (self.output_error_above is None):
            raise ValueError("a rule needs exactly one of layers and output_error_above")


class Quantization(RoundingSettings, frozen=True, kw_only=True):
    """How the routed experts' weights become int4."""

    rules: list[Rule] = msgspec.field(default_factory=list)
    token_floor: Annotated[int, msgspec.Meta(ge=0)] = 256
    """Experts that saw fewer tokens are named as starved; their Hessian is topped up to this many with the layer's."""
    weight_tokens_by_router: bool = False
    """GPTQ counts a token's error by the square of its routing weight, as the layer's output does."""


class CalibrationText(Section, frozen=True, kw_only=True):
    """The text that the source model reads before quantization."""

    sources: Annotated[list[TextSource], msgspec.Meta(min_length=1)]
    tokens_per_scene: Positive = 16384
    """Tokens of a source of weight 1."""
    sequence_tokens: Positive = 512
    replay: Literal["quantized", "original"] = "quantized"
    """The weights that compute what the next block sees: those of the result, or the source's, which makes the layers
    independent of one another."""

    def __post_init__(self) -> None:
        _check_shares(self)


class Cluster(Section, frozen=True, kw_only=True):
    """A Dask cluster that rounds the experts; it changes how long that takes, not what comes out."""

    workers: Positive | None = None
    """Start this many worker processes on this machine."""
    scheduler: str | None = None
    """Address of a Dask scheduler, `tcp://host:8786`, whose workers see source and result by the same paths."""

    def __post_init__(self) -> None:
        if (self.workers is None) == (self.scheduler is None):
            raise ValueError("cluster needs exactly one of workers and scheduler")
        if self.scheduler is not None and not ADDRESS.fullmatch(self.scheduler):
            raise ValueError(f"cluster.scheduler {self.scheduler!r} is no address like tcp://host:8786")


class Serving(Section, frozen=True, kw_only=True):
    """How the checkpoint is launched."""

    engine: Literal["local"] = "local"
    tp: Positive = 1
    activations: Literal["dynamic", "static"] = "dynamic"
    ready_seconds: Positive = 120
    """Give up when the server is not ready by then."""


class TaskSource(Section, frozen=True, kw_only=True):
    """A further lm-eval task."""

    name: str
    """lm-eval's name of a task, a group or a tag."""
    path: str | None = None
    """A folder with the task's dataset, a file a split (test.jsonl, train.parquet); from the Hub if absent."""
    limit: Positive | None = None
    """Ask this many documents, drawn evenly from the tasks of a group; all if absent."""


class AccuracyTask(Section, frozen=True, kw_only=True):
    """The questions and how many of them, how they are asked, and further tasks."""

    questions: str | None = None
    """A directory with the splits test and validation in MMLU-Pro's schema; MMLU-Pro from the Hub if absent."""
    revision: str | None = None
    """A commit of the Hub's dataset."""
    name: str | None = None
    """What the task is called; the directory's name if absent."""
    limit: Positive | None = None
    """Ask this many, drawn evenly from the categories; all if absent."""
    seed: int = 0
    max_tokens: Positive = 2048
    concurrency: Positive = 8
    sequential: bool = False
    """Ask in stages, and stop when the gate's accuracy_loss is settled."""
    stages: list[Share] = msgspec.field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    """Fractions of the questions after which to look."""
    api: Literal["completions", "chat"] = "completions"
    """lm-eval's `local-completions`, or `local-chat-completions`, through the server's chat template."""
    reasoning: bool = False
    """The model thinks before it answers: filters read the answer only, see `lightship.eval.thinking`."""
    tasks: list[str | TaskSource] = msgspec.field(default_factory=list)
    """Further lm-eval tasks, by name or with their own settings."""

    def __post_init__(self) -> None:
        if self.questions is not None and self.revision is not None:
            raise ValueError("revision belongs to MMLU-Pro from the Hub, not to a questions directory")
        twice = {s.name for s in self.task_sources if sum(s.name == other.name for other in self.task_sources) > 1}
        if twice:
            raise ValueError(f"tasks names {', '.join(sorted(twice))} more than once")
        if not self.stages or self.stages[-1] != 1 or self.stages != sorted(set(self.stages)):
            raise ValueError(f"accuracy.stages {self.stages} must increase and end with 1")

    @property
    def task_name(self) -> str:
        """What the task is called."""
        return self.name or (Path(self.questions).name if self.questions else HUB_NAME)

    @property
    def task_sources(self) -> list[TaskSource]:
        return [TaskSource(name=task) if isinstance(task, str) else task for task in self.tasks]


class FidelityText(Section, frozen=True, kw_only=True):
    """Held-out text on which source and quantized model are compared token by token."""

    sources: Annotated[list[TextSource], msgspec.Meta(min_length=1)]
    tokens_per_scene: Positive = 4096
    sequence_tokens: Positive = 512

    def __post_init__(self) -> None:
        _check_shares(self)


def _check_shares(text: CalibrationText | FidelityText) -> None:
    for source in text.sources:
        tokens = source.share(text.tokens_per_scene)
        if tokens < text.sequence_tokens:
            raise ValueError(
                f"scene {source.scene!r}: tokens_per_scene {text.tokens_per_scene} x weight {source.weight:g} is "
                f"{tokens}, less than sequence_tokens {text.sequence_tokens}"
            )


class TraceReplay(Section, frozen=True, kw_only=True):
    """Arrival times, lengths and shared prefixes of a real service."""

    path: str
    """Azure's LLM inference trace (.csv) or Mooncake's (.jsonl)."""
    speed: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """2.0 replays it twice as fast."""
    seconds: Annotated[float, msgspec.Meta(gt=0)] | None = 60.0
    """Of the replay; `requests` limits it too."""
    requests: Positive | None = None
    fit: Literal["clip", "scale"] = "clip"
    """What becomes of requests that are longer than the window: cut each, or scale all by one factor."""
    window: Annotated[int, msgspec.Meta(ge=2)] = 32768
    """Tokens of prompt and answer; the model's context, if that is smaller."""


class ThroughputLoad(Section, frozen=True, kw_only=True):
    """The load under which the two servers are timed."""

    concurrencies: Annotated[list[Positive], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=lambda: [1, 8])
    requests: Positive = 16
    """Timed requests a server and concurrency, in turns between the servers."""
    warmup_requests: Positive = 2
    prompt_tokens: Positive = 256
    output_tokens: Annotated[int, msgspec.Meta(ge=2)] = 32
    rate: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Then also at this many requests a second, Poisson: the same number and lengths."""
    trace: TraceReplay | None = None
    """Then also as this trace tells."""
    ttft_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    tpot_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Limits for the goodput under `rate` and `trace`."""

    def __post_init__(self) -> None:
        if self.requests < max(self.concurrencies):
            raise ValueError(f"requests {self.requests} never reach a concurrency of {max(self.concurrencies)}")
        if (self.rate or self.trace) and self.warmup_requests >= self.requests:
            raise ValueError(f"warmup_requests {self.warmup_requests} leave none of {self.requests} requests to count")


class Recipe(Section, frozen=True, kw_only=True):
    """Everything that decides what a release is, apart from its source."""

    model: str
    """The registered model's name."""
    quantization: Quantization = Quantization()
    calibration: CalibrationText
    cluster: Cluster | None = None
    serving: Serving = Serving()
    accuracy: AccuracyTask
    fidelity: FidelityText
    throughput: ThroughputLoad = ThroughputLoad()
    gate: Gate

    def __post_init__(self) -> None:
        check_gate(self.gate)
        if self.accuracy.sequential and all(against == "champion" for against, _ in self.gate.limits("accuracy_loss")):
            raise ValueError("accuracy.sequential stops by the gate's accuracy_loss against the source; set that limit")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe and make its paths absolute.

    Raises:
        RecipeError: the file is missing, not TOML, has an unknown key, or a value out of its range.
    """
    table = read_toml(path, "recipe")
    try:
        return msgspec.convert(_with_absolute_paths(table, path.resolve().parent), Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"the recipe {path}: {error}; docs/recipes.md lists every key") from error


def _with_absolute_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {
            k: os.path.normpath(folder / v)
            if isinstance(v, str) and (k in ("path", "questions") or (k == "dataset" and v.startswith(".")))
            else _with_absolute_paths(v, folder)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [_with_absolute_paths(v, folder) for v in value]
    return value
