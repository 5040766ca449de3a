"""Let the ranks of a job find each other in a store that may still hold keys of earlier ranks.

A launcher that restarts its ranks keeps its store, and of several launchers each counts restarts for itself: one that
is started again begins at nought while the others go on. So no number that a launcher tells can name the meeting. Rank
0 draws a name instead and calls the ranks that are there; the meeting stands when every one of them has answered.
"""

from __future__ import annotations

import json
import os
import time
import uuid

import torch.distributed as dist

from tessera.embedding.errors import TesseraError

LOOK_SECONDS = 0.05  # between two looks into the store


class RankFailure(TesseraError):
    """Raised when another rank did not come, died or hung; the message names it and the stage it was last seen in."""


def meet(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> dist.Store:
    """Return the part of `store` that these ranks share, and nobody before or after them.

    Raises:
        RankFailure: not all of them have come within the time; rank 0's message names those that are missing.
    """
    me = uuid.uuid4().hex
    end = time.monotonic() + timeout_seconds
    name = me if world_size == 1 else _call(store, me, world_size, end) if rank == 0 else _answer(store, rank, me, end)
    if name is None:
        missing = _missing(store, me, world_size) if rank == 0 else "rank 0"
        raise RankFailure(
            f"{missing} did not come to the job's store at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within {timeout_seconds:.0f} s (trainer.timeout_seconds){_advice()}"
        )
    return dist.PrefixStore(f"meeting/{name}", store)


def _call(store: dist.Store, me: str, world_size: int, end: float) -> str | None:
    """Call the ranks that are there until all have answered, as rank 0; return the name, None after `end`. A restarted
    rank draws a new number and is called by that."""
    called: dict[str, str] = {}
    while time.monotonic() < end:
        here = {str(rank): store.get(f"here/{rank}").decode() for rank in _ranks_in(store, "here/{rank}", world_size)}
        if here != called:
            called = here
            store.set("call", json.dumps({"name": me, "ranks": called}))
        if len(called) == world_size - 1 and store.check([f"yes/{me}/{rank}/{called[rank]}" for rank in called]):
            store.set(f"go/{me}", "")
            return me
        time.sleep(LOOK_SECONDS)
    return None


def _answer(store: dist.Store, rank: int, me: str, end: float) -> str | None:
    """Announce this rank, answer each call that has its number, and return the name when rank 0 says so; None after
    `end`."""
    store.set(f"here/{rank}", me)
    answered = None
    while time.monotonic() < end:
        if store.check(["call"]):
            call = json.loads(store.get("call"))
            name: str = call["name"]
            if call["ranks"].get(str(rank)) == me:
                if name != answered:
                    store.set(f"yes/{name}/{rank}/{me}", "")
                    answered = name
                if store.check([f"go/{name}"]):
                    return name
        time.sleep(LOOK_SECONDS)
    return None


def _ranks_in(store: dist.Store, key: str, world_size: int) -> list[int]:
    """Return the ranks, except 0, that have written their `key`."""
    ranks = range(1, world_size)
    keys = [key.format(rank=rank) for rank in ranks]
    if store.check(keys):
        return list(ranks)
    return [rank for rank, one in zip(ranks, keys, strict=True) if store.check([one])]


def _missing(store: dist.Store, me: str, world_size: int) -> str:
    called = json.loads(store.get("call"))["ranks"] if store.check(["call"]) else {}
    answered = {rank for rank, number in called.items() if store.check([f"yes/{me}/{rank}/{number}"])}
    missing = [str(rank) for rank in range(1, world_size) if str(rank) not in answered]
    shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return f"rank {shown}" if len(missing) == 1 else f"ranks {shown}"


def _advice() -> str:
    """Return advice about torchrun's shared store, which fails when a host comes back; see docs/many_machines.md. Empty
    if it does not apply."""
    several_hosts = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
    if several_hosts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "; on several hosts start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
    return ""
