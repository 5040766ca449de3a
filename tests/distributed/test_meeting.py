"""Ranks meet whatever the ranks before them left in the store, and say who did not come."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from tessera.distributed import meeting
from tessera.distributed.meeting import RankFailure, meet


def met(store: dist.Store, ranks: list[int], world: int, seconds: float = 20.0) -> list[str]:
    """What each rank finds under "name" in its part of the store, where the first one has written its own."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        parts = list(pool.map(lambda rank: meet(store, rank, world, seconds), ranks))
    parts[0].set("name", "here")
    return [part.get("name").decode() if part.check(["name"]) else "" for part in parts]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_ranks_share_a_part_of_the_store_that_is_new_each_time(world):
    store = dist.HashStore()
    for _ in range(3):
        part = meet(store, 0, 1, 1.0) if world == 1 else None
        assert part is None or not part.check(["name"])
        assert met(store, list(range(world)), world) == ["here"] * world


@pytest.mark.parametrize("came_back", [[0], [1], [2], [0, 2]])
def test_ranks_that_died_while_they_waited_are_called_anew(came_back):
    """As when launchers count restarts each for itself: what the dead wrote stays in the store."""
    store = dist.HashStore()
    for rank in came_back:  # they come, wait in vain and die
        with pytest.raises(RankFailure):
            meet(store, rank, 3, 0.2)
    assert met(store, [0, 1, 2], 3) == ["here"] * 3


def test_rank_0_that_comes_back_is_followed_by_those_that_wait_still():
    store, found = dist.HashStore(), {}
    waiting = [
        threading.Thread(target=lambda rank=rank: found.update({rank: meet(store, rank, 3, 30)})) for rank in (1, 2)
    ]
    waiting[0].start()
    with pytest.raises(RankFailure, match="rank 2 did not come"):
        meet(store, 0, 3, 0.5)
    waiting[1].start()
    found[0] = meet(store, 0, 3, 30)
    for one in waiting:
        one.join()
    found[0].set("name", "here")
    assert all(part.get("name") == b"here" for part in found.values())


@pytest.mark.parametrize(("here", "missing"), [([0], "ranks 1, 2"), ([0, 2], "rank 1"), ([1], "rank 0")])
def test_who_did_not_come_is_named(here, missing, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "host0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    store, lines = dist.HashStore(), {}

    def come(rank: int) -> None:
        with pytest.raises(RankFailure) as error:
            meet(store, rank, 3, 0.4)
        lines[rank] = str(error.value)

    with ThreadPoolExecutor(len(here)) as pool:
        list(pool.map(come, here))
    assert lines[here[0]] == (
        f"{missing} did not come to the job's store at host0:29500 within 0 s (trainer.timeout_seconds)"
    )


def test_launchers_that_share_their_store_are_told_what_to_set(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in meeting._advice()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert meeting._advice() == ""
