"""Count what ranks send each other in steps of a real training, by kind of collective."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.train.engine import Engine
from tessera.ctr.train.evaluate import read_split
from tessera.distributed.rank import Process
from tests.ranks import on_hosts_of


class CountedBytes(TorchDispatchMode):
    """Sees every collective of this thread, those that DDP starts from C++ too.

    sent, calls: what this rank has sent to others, and how often, by what it was: ids, rows, gradients, agree, dense
    gradients, and batch norm forward and backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            what, sent = self._seen(func._schema.name.removeprefix("c10d::"), args)
            self.sent[what] += sent
            self.calls[what] += 1
        return func(*args, **(kwargs or {}))

    def _seen(self, name: str, args: tuple) -> tuple[str, int]:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if name == "alltoall_base_":
            group = dist.ProcessGroup.unbox(args[2])
            rank, ranks = group.rank(), group.size()
            sent, parts = args[1], args[4]
            share = (sum(parts) - parts[rank]) / max(1, sum(parts)) if parts else (ranks - 1) / ranks
            return self._all_to_all(sent) + _among(group), round(sent.nbytes * share)
        if name == "_allgather_base_":
            what = {torch.float64: "agree", torch.float32: "batch norm, forward"}
            return what[args[1].dtype], args[1].nbytes * (ranks - 1)
        assert name == "allreduce_", name
        ((sent,),) = (args[0],)
        # A ring; the sums of batch norm are two rows.
        what = "dense gradients" if sent.dim() == 1 else "batch norm, backward"
        return what, sent.nbytes * 2 * (ranks - 1) // ranks

    def _all_to_all(self, sent: Tensor) -> str:
        if not sent.is_floating_point():
            return "ids"
        return "gradients" if torch._C._current_graph_task_id() != -1 else "rows"


def _among(group: dist.ProcessGroup) -> str:
    """Say of a group of some ranks whether they share a host, by LOCAL_WORLD_SIZE."""
    if group.size() == dist.get_world_size():
        return ""
    hosts = {rank // int(os.environ["LOCAL_WORLD_SIZE"]) for rank in dist.get_process_group_ranks(group)}
    return " in the host" if len(hosts) == 1 else " between hosts"


def counted_on_hosts(process: Process, each: int, jobs: list[list[str]], first: int, steps: int) -> list:
    """The same on hosts of `each` ranks, as their launchers would say."""
    on_hosts_of(process, each)
    return counted_steps(process, jobs, first, steps)


def counted_steps(process: Process, jobs: list[list[str]], first: int, steps: int) -> list[tuple[dict, dict]]:
    """Train each job; return bytes and calls of this rank and `steps` steps from step `first` on."""
    return [_counted(process, arguments, first, steps) for arguments in jobs]


def _counted(process: Process, arguments: list[str], first: int, steps: int) -> tuple[dict, dict]:
    config = load_config(arguments, "")
    schema = Schema(config.data.schema)
    reader = read_split(config, schema, process, "train")
    assert reader is not None
    engine, counted = Engine(config, schema, process), CountedBytes()
    for batch in engine.pipeline.feed(reader.epoch(0), begins=True):
        if engine.step < first:
            engine.train_step(batch)
            continue
        with counted:
            engine.train_step(batch)
        if engine.step == first + steps:
            break
    return dict(counted.sent), dict(counted.calls)
