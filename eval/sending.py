"""Requests to an OpenAI-compatible server: sent again while that can help, and ended with the server's words where not.

    identify_served(Endpoint("http://127.0.0.1:8000", "checkpoint", Path("checkpoint")))

The endpoint's API key is sent with every request. Where a server repeats it, it is taken out.
"""

import asyncio
import logging
from typing import Any

from lightship.endpoint import API_KEY_VARIABLE, Endpoint
from lightship.errors import EvaluationError
from lightship.files import digest_of

log = logging.getLogger("lm_eval")

ATTEMPTS = 5
PAUSE_SECONDS = 0.5
"""Before the second attempt; twice as long before each further one."""
LONGEST_PAUSE_SECONDS = 60.0
TEMPORARY = {408, 409, 425, 429}
"""Statuses, beside 500 and above, after which the same request may succeed."""
SAID = 300
"""Characters of a server's words that an error repeats."""
STABLE_FIELDS = ("id", "root", "parent", "owned_by", "max_model_len")
"""Of an entry of /v1/models; others change at every start."""


def identify_served(endpoint: Endpoint) -> str:
    """A digest that changes with the model that the endpoint serves, as far as it tells.

    Raises:
        EvaluationError: it does not answer, refuses the key, or does not serve the endpoint's model.
    """
    import httpx

    url = f"{endpoint.base_url.rstrip('/')}/v1/models"
    try:
        response = httpx.get(url, timeout=30, trust_env=False, headers=endpoint.headers)
    except httpx.HTTPError as error:
        raise EvaluationError(f"{url} does not answer ({error}); is the server up? See `lightship serve`") from error
    if response.status_code != 200:
        raise _refusal(url, response.status_code, without_key(response.text, endpoint))
    try:
        entries = {entry["id"]: entry for entry in response.json()["data"]}
    except (ValueError, LookupError, TypeError) as error:
        raise EvaluationError(
            f"{url} does not list models as an OpenAI-compatible server does ({error}); check the URL"
        ) from error
    if endpoint.model not in entries:
        raise EvaluationError(f"{url} serves {', '.join(entries)}, not {endpoint.model}")
    entry = entries[endpoint.model]
    return digest_of([{k: entry.get(k) for k in STABLE_FIELDS}, endpoint.identity])


class _AttemptError(Exception):
    """An attempt that may be repeated."""

    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(why)
        self.pause = pause


async def send(session: Any, url: str, payload: dict[str, Any], endpoint: Endpoint) -> Any:
    """The server's answer, from JSON; a request that fails for the time being is sent again, after longer and longer.

    Args:
        session: aiohttp's, with the endpoint's headers.

    Raises:
        EvaluationError: the server refuses the request, or it failed `ATTEMPTS` times.
    """
    for attempt in range(ATTEMPTS):
        try:
            return await _attempt(session, url, payload, endpoint)
        except _AttemptError as failure:
            log.warning("attempt %d of %d failed: %s", attempt + 1, ATTEMPTS, failure)
            last = failure
        if attempt + 1 < ATTEMPTS:
            await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, max(last.pause, PAUSE_SECONDS * 2**attempt)))
    raise EvaluationError(f"{url} failed {ATTEMPTS} times on one request: {last}")


async def _attempt(session: Any, url: str, payload: dict[str, Any], endpoint: Endpoint) -> Any:
    from aiohttp import ClientError

    try:
        async with session.post(url, json=payload, allow_redirects=False) as response:
            said = without_key(await response.text(), endpoint)
            if response.status in TEMPORARY or response.status >= 500:
                wait = response.headers.get("Retry-After", "")
                raise _AttemptError(
                    f"status {response.status}, {said[:SAID]!r}", float(wait) if wait.isdecimal() else 0
                )
            if response.status != 200:
                raise _refusal(url, response.status, said)
            outputs = await response.json(content_type=None)
    except (ClientError, TimeoutError, OSError, ValueError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise _AttemptError(without_key(str(error), endpoint) or type(error).__name__) from error
    if not (isinstance(outputs, dict) and outputs.get("choices")):
        raise _AttemptError(f"an answer without choices, {said[:SAID]!r}")
    return outputs


def without_key(said: str, endpoint: Endpoint) -> str:
    """A server's words without the key that it may have repeated."""
    return said.replace(endpoint.api_key, "<the API key>") if endpoint.api_key else said


def _refusal(url: str, status: int, said: str) -> EvaluationError:
    next_step = {
        401: f"give the server's key by --api-key-file or in {API_KEY_VARIABLE}",
        403: f"give a key that may use it, by --api-key-file or in {API_KEY_VARIABLE}",
        404: "check the URL and the model's name",
        400: "a prompt longer than the model's context, or a setting that this server does not take, ends like this",
    }.get(status, "see the server's log")
    return EvaluationError(f"{url} refuses the request with status {status}, {said[:SAID]!r}; {next_step}")
