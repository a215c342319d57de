"""A served model as its clients see it: an OpenAI-compatible address, a model name, and the tokenizer that goes with it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Endpoint:
    """Where to send requests; either engine, or any OpenAI-compatible server."""

    base_url: str
    """Without `/v1`: http://127.0.0.1:8000"""
    model: str
    """The name that `/v1/models` lists."""
    tokenizer: Path
    """A directory with the model's tokenizer."""
