import torch

from lightship.serving.sampling import GREEDY_BELOW, Sampling, draw, likelihoods


def test_top_p_draws_only_from_the_likeliest_tokens() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {draw(logits, Sampling(1, top_p=0.7), generator) for _ in range(200)}
    assert drawn == {0, 1}


def test_draws_follow_the_temperature() -> None:
    logits = torch.tensor([0.8, 0.2]).log()
    generator = torch.Generator().manual_seed(0)
    share = sum(draw(logits, Sampling(1, temperature=2.0), generator) for _ in range(4000)) / 4000
    assert abs(share - 1 / 3) < 0.03


def test_likelihoods_are_natural_log_probabilities_best_first() -> None:
    [likelihood] = likelihoods(torch.tensor([[0.5, 0.125, 0.375]]).log(), [1], 2)
    assert abs(likelihood.logprob - torch.tensor(0.125).log()) < 1e-6
    assert [token for token, _ in likelihood.top] == [0, 2]


def test_temperatures_that_cannot_be_divided_by_are_greedy() -> None:
    assert Sampling(1, temperature=1e-310).generator() is None
    generator = torch.Generator().manual_seed(0)
    assert draw(torch.tensor([1.0, 3.0, 2.0]), Sampling(1, temperature=GREEDY_BELOW), generator) == 1
