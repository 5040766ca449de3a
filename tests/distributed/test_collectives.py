"""What ranks do together, and that a job of one rank does not need the others."""

import pytest
import torch

from tessera.distributed import collectives
from tessera.embedding.errors import ConfigError
from tests.ranks import on_ranks


def everything(process):
    rank = process.rank
    sums, least = (torch.tensor([1.0 + rank, 10.0]), torch.tensor([5 * rank])), torch.tensor([3 - rank, 3 + rank])
    collectives.wait_for_all()
    collectives.sum_over_ranks(*sums)
    collectives.min_over_ranks(least)
    return {
        "ranks": collectives.ranks(),
        "sums": [one.tolist() for one in sums],
        "least": least.tolist(),
        "gathered": collectives.gather(torch.tensor([rank, -rank])).tolist(),
        "objects": collectives.gather_objects({"rank": rank}),
        "first": collectives.from_first_rank(f"rank {rank}"),
        "called": collectives.on_first_rank(process, lambda: f"on {rank}"),
        "all": [collectives.on_all_ranks(rank >= least_rank) for least_rank in (0, 1, 2)],
        "any": [collectives.on_any_rank(rank >= least_rank) for least_rank in (0, 1, 2)],
    }


def fails_on_the_first(process):
    def fail():
        raise ConfigError("key x is 7; expected 1")

    with pytest.raises(ConfigError, match="key x is 7"):
        collectives.on_first_rank(process, fail)
    return True


ALONE = {
    "ranks": 1,
    "sums": [[1.0, 10.0], [0]],
    "least": [3, 3],
    "gathered": [[0, 0]],
    "objects": [{"rank": 0}],
    "first": "rank 0",
    "called": "on 0",
    "all": [True, False, False],
    "any": [True, False, False],
}
BOTH = {
    "ranks": 2,
    "sums": [[3.0, 20.0], [5]],
    "least": [2, 3],
    "gathered": [[0, 0], [1, -1]],
    "objects": [{"rank": 0}, {"rank": 1}],
    "first": "rank 0",
    "called": "on 0",
    "all": [True, False, False],
    "any": [True, True, False],
}


def test_two_ranks_agree():
    assert on_ranks(2, everything) == [BOTH, BOTH]


def test_one_rank_has_nobody_to_wait_for():
    assert on_ranks(1, everything) == [ALONE]


def test_a_mistake_that_the_first_rank_finds_ends_all():
    assert on_ranks(2, fails_on_the_first) == [True, True]
