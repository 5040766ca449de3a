"""Find which ranks share a host, for what is merged inside one before it leaves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist

from tessera.distributed.collectives import gather_objects
from tessera.embedding.errors import ConfigError

KEY = "embedding.exchange is by_host"


@dataclass(frozen=True)
class HostGroups:
    """inside: the ranks of this host; between: the ranks, one of each host, that have this rank's place in theirs. Rank
    r of the job is rank r % inside.size() of the group inside and r // inside.size() of the one between."""

    inside: dist.ProcessGroup
    between: dist.ProcessGroup


# torch keeps groups until the job's ends. Those of a job are made once, whatever number of models it builds.
_made: WeakKeyDictionary[dist.ProcessGroup, HostGroups] = WeakKeyDictionary()


def host_groups(world: dist.ProcessGroup, timeout_seconds: float) -> HostGroups | None:
    """Return the groups of this rank, None where they would change nothing: on one host, or with one rank on each.
    Collective.

    world: all ranks; timeout_seconds: the longest wait for another rank in a collective of the groups.

    Raises:
        ConfigError: hosts have different numbers of ranks, or those of one do not follow each other.
    """
    if world in _made:
        return _made[world]
    places = [(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))]
    places = gather_objects(places[0], world)
    ranks, each = len(places), places[0][1]
    check_places(places)
    if each in (1, ranks):
        return None
    wait = timedelta(seconds=timeout_seconds)
    inside = [dist.new_group(list(range(first, first + each)), wait) for first in range(0, ranks, each)]
    between = [dist.new_group(list(range(place, ranks, each)), wait) for place in range(each)]
    _made[world] = HostGroups(inside[world.rank() // each], between[world.rank() % each])
    return _made[world]


def check_places(places: list[tuple[int, int]]) -> None:
    """Raise ConfigError for ranks that are not spread over hosts alike. places: of each rank, its number on its host
    and how many ranks the host has, as launchers tell them (LOCAL_RANK, LOCAL_WORLD_SIZE)."""
    sizes = sorted({size for _, size in places})
    if len(sizes) > 1:
        found = " and ".join(map(str, sizes))
        raise ConfigError(f"{KEY}, and hosts have {found} ranks; expected equally many, or embedding.exchange=flat")
    for rank, (place, size) in enumerate(places):
        if place != rank % size or len(places) % size:
            raise ConfigError(
                f"{KEY}, and rank {rank} of {len(places)} is number {place} of {size} on its host; expected the ranks "
                "of a host to follow each other, or embedding.exchange=flat"
            )


def described(groups: HostGroups | None) -> str:
    """Return in one line what `embedding.exchange: by_host` does."""
    if groups is None:
        return f"{KEY}, which changes nothing on one host, or with one rank on each"
    return (
        f"ids are merged among the {groups.inside.size()} ranks of each of {groups.between.size()} hosts before they "
        "leave it, and so are gradients"
    )
