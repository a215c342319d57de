"""lm-eval's models `local-completions` and `local-chat-completions`, with our own way of sending and of remembering.

    model = asking_model(endpoint, recipe.accuracy, log)     # give it to lm_eval.evaluator.evaluate

What lm-eval asks and how a request looks is its own code. Ours sends the requests, so that each answer is in the log
before the next is asked for, and an answer in the log is not asked for again.
A greedy request that lm-eval sends several times is asked as often.
"""

import asyncio
import copy
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cache
from typing import Any, cast

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.answer_log import AnswerLog, LoggedAnswer
from lightship.eval.sending import SAID, send, without_key
from lightship.eval.thinking import Reply, read_plain, read_reasoning
from lightship.files import digest_of
from lightship.progress import tracked
from lightship.recipe import AccuracyTask

REQUEST_SECONDS = 1800
NO_LIMIT = 2**31
"""lm-eval cuts prompts to this many tokens without a word; let the server refuse them instead."""


class AskedText(str):
    """A text that the task's filter reads, with what lm-eval has no place for."""

    truncated: bool
    prompt_digest: str


def asking_model(endpoint: Endpoint, task: AccuracyTask, answers: AnswerLog, served: str) -> Any:
    """The lm-eval model that asks `endpoint` as the recipe says.

    Args:
        served: the identity of what the endpoint serves, see `identify_served`.
    """
    chat = task.api == "chat"
    model = _model_class(task.api)(
        endpoint,
        task,
        answers,
        served,
        model=endpoint.model,
        base_url=f"{endpoint.base_url.rstrip('/')}/v1/{'chat/completions' if chat else 'completions'}",
        tokenizer=None if chat else str(endpoint.tokenizer),
        tokenizer_backend=None if chat else "huggingface",
        # lm-eval sends a single request at a time by other means; ours holds back by itself.
        num_concurrent=max(2, task.concurrency),
        max_length=NO_LIMIT,
    )
    if not chat:
        # The tokenizer would warn about prompts that the server may well take.
        model.tokenizer.model_max_length = NO_LIMIT
    return model


def prompt_digest(prompt: Any) -> str:
    """SHA-256 of a request's prompt as lm-eval gives it: a text, chat messages, or a context with a continuation."""
    return digest_of(getattr(prompt, "prompt", prompt))


class _Asking:
    """What both of lm-eval's models get from us. Mixed in before them, so that its methods come first."""

    base_url: str
    _seed: int

    def __init__(self, endpoint: Endpoint, task: AccuracyTask, answers: AnswerLog, served: str, **arguments: Any):
        super().__init__(**arguments)
        self.endpoint = endpoint
        self.task = task
        self.answers = answers
        self.served = served
        self.asked: Counter[str] = Counter()

    async def get_batched_requests(
        self,
        requests: Sequence[Any],
        cache_keys: Sequence[Any],
        *,
        generate: bool = True,
        ctxlens: Sequence[int] | None = None,
        gen_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> list[list[Any]]:
        """The answer to each request, in a list of its own, as lm-eval wants it.

        Args:
            requests: token ids, or messages.
            cache_keys: the texts that they were made from.
            ctxlens: of each request's tokens, those that come before the continuation in question.
        """
        from aiohttp import ClientSession, ClientTimeout, TCPConnector

        stops = list((gen_kwargs or {}).get("until") or [])
        payloads = [self._payload(request, generate, gen_kwargs) for request in requests]
        keys = [self._key(payload) for payload in payloads]
        prompts = [prompt_digest(cache_key[0] if generate else list(cache_key)) for cache_key in cache_keys]
        missing = [n for n, key in enumerate(keys) if self.answers.get(key) is None]
        unasked = iter(missing)
        known = len(keys) - len(missing)
        what = f"asking {self.endpoint.model}{f', {known} of {len(keys)} answered before' if known else ''}"
        bar = cast("Generator[int]", tracked(range(len(missing)), what))
        timeout, connector = ClientTimeout(total=REQUEST_SECONDS), TCPConnector(limit=self.task.concurrency)
        with closing(bar) as progress:
            next(progress, None)
            async with ClientSession(connector=connector, timeout=timeout, headers=self.endpoint.headers) as session:

                async def ask_on() -> None:
                    for n in unasked:
                        outputs = await send(session, self.base_url, payloads[n], self.endpoint)
                        ctxlen = ctxlens[n] if ctxlens else None
                        self.answers.add(self._logged(keys[n], prompts[n], outputs, requests[n], ctxlen))
                        next(progress, None)

                try:
                    await _all_or_first_error([ask_on() for _ in range(self.task.concurrency)])
                except EvaluationError as error:
                    kept = f"{len(self.answers)} answers are kept in {self.answers.path}"
                    raise EvaluationError(f"{error}; {kept}, and the same command goes on from there") from error
        found = [self.answers.get(key) for key in keys]
        return [[self._read(answer, generate, stops)] for answer in found]

    def _payload(self, request: Any, generate: bool, gen_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        payload: dict[str, Any] = self._create_payload(  # type: ignore[attr-defined]
            self.create_message([request]),  # type: ignore[attr-defined]
            generate=generate,
            gen_kwargs=copy.deepcopy(gen_kwargs),
            seed=self._seed,
        )
        if self.task.reasoning:
            payload.pop("stop", None)
        return payload

    def _key(self, payload: dict[str, Any]) -> str:
        """What decides the answer: also the how manieth request of this wording it is, for tasks that repeat one."""
        wording = digest_of([self.task.api, self.served, payload])
        self.asked[wording] += 1
        return digest_of([wording, self.asked[wording]])

    def _logged(self, key: str, prompt: str, outputs: Any, request: Any, ctxlen: int | None) -> LoggedAnswer:
        try:
            if ctxlen is not None:
                ((logprob, greedy),) = self.parse_logprobs(outputs, tokens=[request], ctxlens=[ctxlen])  # type: ignore[attr-defined]
                return LoggedAnswer(key=key, prompt=prompt, logprob=float(logprob), greedy=bool(greedy))
            choice = outputs["choices"][0]
            message = choice["message"] if self.task.api == "chat" else choice
            text = message["content" if self.task.api == "chat" else "text"]
            thinking = message.get("reasoning_content") or message.get("reasoning")
        except (LookupError, TypeError, AttributeError, ValueError, AssertionError) as error:
            raise EvaluationError(
                f"{self.base_url} gives no answer that lm-eval can read ({type(error).__name__}: {error}); "
                f"it said {without_key(str(outputs), self.endpoint)[:SAID]}"
            ) from error
        finish = choice.get("finish_reason")
        return LoggedAnswer(key=key, prompt=prompt, text=text or "", thinking=thinking, finish=finish)

    def _read(self, answer: LoggedAnswer | None, generate: bool, stops: list[str]) -> Any:
        assert answer is not None, "every request was answered"
        if not generate:
            return answer.logprob, answer.greedy
        reply: Reply = (
            read_reasoning(answer.text, answer.thinking, answer.finish, stops)
            if self.task.reasoning
            else read_plain(answer.text, answer.finish)
        )
        text = AskedText(reply.text)
        text.truncated, text.prompt_digest = reply.truncated, answer.prompt
        return text


@cache
def _model_class(api: str) -> Any:
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    base = LocalChatCompletion if api == "chat" else LocalCompletionsAPI
    return type("AskingModel", (_Asking, base), {})


async def _all_or_first_error(work: list[Any]) -> None:
    """Run everything; the first error ends the rest."""
    running = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*running)
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
