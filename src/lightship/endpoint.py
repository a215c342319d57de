"""A served model as its clients see it: an OpenAI-compatible address, a model name, and its tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path

from lightship.errors import ServingError


@dataclass(frozen=True)
class Endpoint:
    """Where to send requests; either engine, or any OpenAI-compatible server."""

    base_url: str
    """Without `/v1`: http://127.0.0.1:8000"""
    model: str
    """The name that `/v1/models` lists."""
    tokenizer: Path
    """A directory with the model's tokenizer."""
    api_key: str | None = field(default=None, repr=False)
    context_tokens: int | None = None
    """`max_model_len`, if `/v1/models` says it."""

    @classmethod
    def connect(cls, url: str, tokenizer: Path, api_key: str | None = None) -> "Endpoint":
        """The first model that a running server lists.

        Raises:
            ServingError: the server does not answer as an OpenAI-compatible one.
        """
        import httpx

        base_url = url.rstrip("/").removesuffix("/v1")
        try:
            headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
            answer = httpx.get(f"{base_url}/v1/models", timeout=10, trust_env=False, headers=headers)
            model = answer.raise_for_status().json()["data"][0]
            return cls(base_url, model["id"], tokenizer, api_key, model.get("max_model_len"))
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ServingError(f"{base_url}/v1/models does not list a model ({error}); is the server up?") from error
