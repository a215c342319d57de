"""A served model as its clients see it: an OpenAI-compatible address, a model name, and its tokenizer."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightship.errors import ServingError

API_KEY_VARIABLE = "LIGHTSHIP_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """Where to send requests; either engine, or any OpenAI-compatible server."""

    base_url: str
    """Without `/v1`: http://127.0.0.1:8000"""
    model: str
    """The name that `/v1/models` lists."""
    tokenizer: Path
    """A directory with the model's tokenizer; where a client sends text only, it is not read."""
    identity: str = ""
    """Changes with what the server computes, where that is known: see `Launched.endpoint`."""
    api_key: str | None = field(default=None, repr=False)
    """Sent with every request, and never shown or stored."""
    context_tokens: int | None = None
    """`max_model_len`, if `/v1/models` says it."""

    @classmethod
    def connect(cls, url: str, tokenizer: Path, api_key: str | None = None, model: str | None = None) -> "Endpoint":
        """The named model of a running server, or the first one that it lists.

        Raises:
            ServingError: the server does not answer as an OpenAI-compatible one.
        """
        import httpx

        endpoint = cls(url.rstrip("/").removesuffix("/v1"), model or "", tokenizer, api_key=api_key)
        if model:
            return endpoint
        where = f"{endpoint.base_url}/v1/models"
        try:
            answer = httpx.get(where, timeout=10, trust_env=False, headers=endpoint.headers).raise_for_status()
            first = answer.json()["data"][0]
            return replace(endpoint, model=first["id"], context_tokens=first.get("max_model_len"))
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ServingError(f"{where} does not list a model ({error}); is it up, and the key right?") from error

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of every request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def read_api_key(file: Path | None) -> str | None:
    """The key in a file, or in the environment's LIGHTSHIP_API_KEY; None if there is neither.

    Raises:
        ServingError: the file cannot be read, or holds no key.
    """
    if file is None:
        return os.environ.get(API_KEY_VARIABLE, "").strip() or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(f"the file {file} of --api-key-file cannot be read: {error}") from error
    if not key or not key.isprintable() or " " in key:
        raise ServingError(f"the file {file} of --api-key-file holds no key; it must hold the key and nothing else")
    return key
