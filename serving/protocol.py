"""Requests of the OpenAI API as the local engine takes them; what it cannot do is refused, never ignored.

Every field is either used, or in NEUTRAL with a value that means "off", or in UNUSED; the refusal names it.
"""

from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from lightship.serving.sampling import Sampling

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "num_beams": (1,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that the local engine cannot change, and the values, beside null, that ask for what it does anyway."""
UNUSED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id"),
        "parallel_tool_calls",  # says nothing without tools
        "max_gen_toks",  # lm-eval's own name, which it leaves in place beside max_tokens
    }
)
"""Fields that do not change the answer."""

Stop = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel, extra="forbid"):
    include_usage: bool = False


class GenerationRequest(BaseModel, extra="forbid"):
    """What completions and chat completions share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | list[Stop] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, data: Any) -> Any:
        """Check the fields that the model has no attribute for, and leave them out; "forbid" refuses the others."""
        if not isinstance(data, dict):
            return data
        for name, neutral in NEUTRAL.items():
            value = data.get(name)
            if value is not None and value not in neutral:
                raise ValueError(f"engine local does not support {name} = {value!r}, only {neutral[0]!r}")
        return {name: value for name, value in data.items() if name not in NEUTRAL and name not in UNUSED}

    def sampling(self, max_tokens: int, *, logprobs: int | None, prompt_logprobs: bool = False) -> Sampling:
        """The engine's view of this request."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(stop),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: one prompt or several, as text or as token ids."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompt, or the prompts, as a list."""
        one: Any = self.prompt
        is_one = isinstance(one, str) or (one and isinstance(one[0], int))
        return [one] if is_one else list(one)


class Message(BaseModel, extra="allow"):
    role: str
    content: str


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def top_needs_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        return self
