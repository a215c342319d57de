"""The next token from logits, greedy or drawn from the request's own seed, and its log-probability."""

from dataclasses import dataclass

import torch

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: to divide logits by them overflows, and would draw the likeliest token anyway."""


@dataclass(frozen=True)
class Sampling:
    """What a request asks of its generation."""

    max_tokens: int
    temperature: float = 1.0
    """0, and what is below GREEDY_BELOW, is greedy."""
    top_p: float = 1.0
    seed: int | None = None
    """None draws a new one."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report the log-probability of each token and of this many most likely ones."""
    prompt_logprobs: bool = False
    """Report them for the prompt's tokens too."""

    def generator(self) -> torch.Generator | None:
        """The request's own source of randomness; None if it is greedy."""
        if self.temperature < GREEDY_BELOW:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(frozen=True)
class Likelihood:
    """A token's natural log-probability under the model, and the most likely tokens with theirs, best first."""

    logprob: float
    top: list[tuple[int, float]]


def draw(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn from softmax(logits / temperature), cut to the smallest set whose probability reaches top_p."""
    probabilities_V = (logits_V.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True)
        before_V = sorted_V.cumsum(0) - sorted_V
        probabilities_V = torch.zeros_like(sorted_V).scatter_(0, order_V, sorted_V * (before_V < sampling.top_p))
    return int(probabilities_V.multinomial(1, generator=generator))


def likelihoods(logits_NV: torch.Tensor, tokens_N: list[int], top: int) -> list[Likelihood]:
    """The likelihood of each row's token, with the `top` most likely tokens of the row."""
    logprobs_NV = logits_NV.float().log_softmax(-1)
    chosen_N = logprobs_NV.gather(1, torch.tensor(tokens_N)[:, None])[:, 0].tolist()
    best_NK, ids_NK = logprobs_NV.topk(min(top, logprobs_NV.shape[1]), dim=-1)
    return [
        Likelihood(chosen, list(zip(ids, best, strict=True)))
        for chosen, ids, best in zip(chosen_N, ids_NK.tolist(), best_NK.tolist(), strict=True)
    ]
