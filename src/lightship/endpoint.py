"""A served model as its clients see it: an OpenAI-compatible address, a model name, and its tokenizer."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from lightship.errors import ServingError

KEY_VARIABLE = "LIGHTSHIP_API_KEY"


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


def read_api_key(path: Path | None) -> str | None:
    """The key in a file, or in $LIGHTSHIP_API_KEY without one; never an argument, which every user of the machine sees.

    Raises:
        ServingError: the file cannot be read or is empty.
    """
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(f"the API key file {path} cannot be read: {error}") from error
    if not key:
        raise ServingError(f"the API key file {path} is empty")
    return key
