from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from lightship.errors import CheckpointError, ServingError
from lightship.serving.ragged import Span, Step
from lightship.serving.ranks import Ranks, Shard

PROMPT = [(11 * i) % 256 + 2 for i in range(24)]


@contextmanager
def loaded(shard: Shard) -> Iterator[Ranks]:
    threads = torch.get_num_threads()
    with closing(Ranks(shard)) as ranks:
        try:
            ranks.load()
            yield ranks
        finally:
            torch.set_num_threads(threads)


def logits(path: Path, tp: int, dtype: torch.dtype) -> torch.Tensor:
    """Of a prompt and then of one decoded token."""
    with loaded(Shard(path, tp, "dynamic", dtype)) as ranks:
        assert len(ranks.workers) == tp - 1
        return torch.cat([ranks.run(Step([Span(0, PROMPT, len(PROMPT))])), ranks.run(Step([Span(0, [9], 1)]))])


@pytest.fixture(scope="module")
def single(w4afp8_dir: Path) -> torch.Tensor:
    return logits(w4afp8_dir, 1, torch.float64)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_real_processes_give_the_logits_of_one(tp: int, w4afp8_dir: Path, single: torch.Tensor) -> None:
    sharded = logits(w4afp8_dir, tp, torch.float64)
    assert (sharded - single).norm() / single.norm() < 1e-9


def test_fp8_source_gives_the_same_logits_on_two_ranks(fp8_dir: Path) -> None:
    single, sharded = (logits(fp8_dir, tp, torch.float64) for tp in (1, 2))
    assert (sharded - single).norm() / single.norm() < 1e-9


def test_an_indivisible_degree_names_the_possible_ones(w4afp8_dir: Path) -> None:
    with pytest.raises(ServingError, match=r"TP 16.*possible degrees: 1, 2, 4, 8"):
        Shard(w4afp8_dir, 16, "dynamic").load(0)


def test_a_killed_rank_is_an_error_that_names_it(w4afp8_dir: Path) -> None:
    with loaded(Shard(w4afp8_dir, 2, "dynamic")) as ranks:
        ranks.workers[0].kill()
        ranks.workers[0].join()
        with pytest.raises(ServingError, match=r"rank 1 .*exit code -9"):
            ranks.run(Step([Span(0, PROMPT, 1)]))


def test_a_broken_checkpoint_leaves_no_worker_behind(tmp_path: Path) -> None:
    with closing(Ranks(Shard(tmp_path, 2, "dynamic"))) as ranks, pytest.raises(CheckpointError, match=r"config\.json"):
        ranks.load()
    assert not ranks.workers[0].is_alive()
