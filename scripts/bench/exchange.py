"""Time that one rank's Python takes for the exchange of a step, on simulated numbers of ranks and tables.

The process group is torch's fake one: nothing is sent, and every other rank is taken to ask and to answer as this one
does. So ids, rows and gradients have the sizes that they would have, and what is measured is work that each rank does
for itself: of the whole pass, look-up and update of rows included; of all but those, `exchange`; and of that with one
id for each table, `python`, which is what hardly depends on ids.

    python scripts/bench/exchange.py --ranks 1 2 8 64 1024 --tables 26 200
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchrec import KeyedJaggedTensor
from torchrec.distributed.types import ShardingEnv

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.torchrec.kernel import DynamicTableKernel
from tessera.embedding.config import DynamicTableConfig, Group

GROUPS = (Group("v", 16, 0.01), Group("w", 1, 0.01))


class Done:
    """Work of a collective that is done already."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def echo(output: Tensor, input: Tensor, *_: Any, async_op: bool = False, **__: Any) -> Done | None:
    """Stand for `all_to_all_single`: every rank has sent what this one sends to it."""
    output.copy_(input)
    return Done() if async_op else None


def sharded(tables: int, ids_per_table: int) -> DynamicTables:
    configs = [DynamicTableConfig(f"t{i}", (f"f{i}",), GROUPS, chunk_rows=1 << 12) for i in range(tables)]
    model = DynamicTables(configs, [f"f{i}" for i in range(tables)], 10 * ids_per_table)
    (sharder, _) = model.sharders()
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    model.collection = sharder.shard(model.collection, plan_of(model, env.world_size), env, torch.device("cpu"))
    return model


def plan_of(model: DynamicTables, ranks: int) -> dict[str, Any]:
    from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardMetadata

    found = {}
    for config in model.collection.embedding_configs():
        rows = -(-config.num_embeddings // ranks)
        shards = [ShardMetadata([r * rows, 0], [rows, config.embedding_dim], f"rank:{r}/cpu") for r in range(ranks)]
        found[config.name] = ParameterSharding(
            sharding_type="row_wise",
            compute_kernel=model.compute_kernel,
            ranks=list(range(ranks)),
            sharding_spec=EnumerableShardingSpec(shards),
        )
    return found


def without_tables(kernel: DynamicTableKernel) -> None:
    """Let a kernel answer with zeros and forget gradients."""
    width = sum(group.dim for group in GROUPS)
    kernel.look_up = lambda request: torch.zeros(request.mixed.numel(), width)  # type: ignore[method-assign]
    kernel.update = lambda grads, request: None  # type: ignore[method-assign]


def step_seconds(ranks: int, tables: int, ids: int, steps: int, *, whole: bool) -> float:
    """Return the median CPU seconds of a forward and backward pass in steady state. whole: with look-up and update."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        model, generator = sharded(tables, ids), torch.Generator().manual_seed(0)
        model.train()
        if not whole:
            for kernel in model._kernels():
                without_tables(kernel)
        batches = [torch.randint(0, 10 * ids, (tables * ids,), generator=generator) for _ in range(4)]
        lengths = torch.ones(tables * ids, dtype=torch.int32)
        times = []
        for step in range(steps + 4):
            keyed = KeyedJaggedTensor(keys=[f"f{i}" for i in range(tables)], values=batches[step % 4], lengths=lengths)
            begin = time.process_time()
            model.begin_step(step)
            embeddings = model(keyed)
            sum(one.sum() for one in embeddings.values()).backward()
            times.append(time.process_time() - begin)
        return statistics.median(times[4:])
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8, 64, 256, 1024])
    parser.add_argument("--tables", type=int, nargs="+", default=[1, 26, 200])
    parser.add_argument("--ids", type=int, default=4096, help="of one rank's step, over all tables")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--whole", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.all_to_all_single = echo
    print(f"milliseconds of a step, {options.ids} ids over all tables, median of {options.steps}; {torch.__version__}")
    print(f"{'ranks':>8}{'tables':>8}{'whole':>10}{'exchange':>10}{'python':>10}")
    for ranks in options.ranks:
        for tables in options.tables:
            ids = max(1, options.ids // tables)
            whole = step_seconds(ranks, tables, ids, options.steps, whole=True) if options.whole else float("nan")
            exchange = step_seconds(ranks, tables, ids, options.steps, whole=False)
            python = step_seconds(ranks, tables, 1, options.steps, whole=False)
            print(
                f"{ranks:>8}{tables:>8}" + "".join(f"{1e3 * x:>10.2f}" for x in (whole, exchange, python)), flush=True
            )


if __name__ == "__main__":
    main()
