"""What the local engine tells Prometheus, at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One server's counters, gauges and histograms, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "lightship_requests", "Answered HTTP requests.", ["path", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("lightship_prompt_tokens", "Prompt tokens read.", registry=self.registry)
        self.generated_tokens = Counter("lightship_generated_tokens", "Tokens generated.", registry=self.registry)
        self.running = Gauge("lightship_sequences_running", "Sequences in flight.", registry=self.registry)
        self.waiting = Gauge("lightship_sequences_waiting", "Sequences that wait for room.", registry=self.registry)
        self.time_to_first_token = Histogram(
            "lightship_time_to_first_token_seconds",
            "From a sequence's arrival to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.sequence_seconds = Histogram(
            "lightship_sequence_seconds",
            "From a sequence's arrival to its last token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._engine = Gauge(
            "lightship_engine",
            "1; the labels say what is served and how.",
            ["engine", "model", "tp", "activations", "quantization"],
            registry=self.registry,
        )

    def describe(self, *, model: str, tp: int, activations: str, quantization: str) -> None:
        """Name what is served."""
        self._engine.labels("local", model, str(tp), activations, quantization).set(1)

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
