"""What a training step of dynamic tables asks of torch does not grow with the number of tables."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.sharding import shard
from tessera.embedding.config import DynamicTableConfig, Group
from tests.ranks import on_ranks

BATCH = 16


class Counted(TorchDispatchMode):
    """Counts the operations that torch carries out."""

    def __init__(self):
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops += 1
        return op(*args, **(kwargs or {}))


def ops_of_steps(process, tables):
    """Return the operations of a step with known ids and of one with new ids, forward and backward."""
    names = [f"t{number}" for number in range(tables)]
    groups = (Group("v", 4, 0.5), Group("w", 1, 0.0))
    configs = [DynamicTableConfig(name, (name,), groups) for name in names]
    module = DynamicTables(configs, names, expected_rows=100)
    sharded, _ = shard(module, module, process, BATCH)
    counts = []
    for step, ids in enumerate((0, 0, 0, 5)):
        batch = KeyedJaggedTensor(
            keys=names,
            values=torch.arange(ids, BATCH + ids).repeat(tables),
            lengths=torch.ones(BATCH * tables, dtype=torch.int32),
        )
        module.begin_step(now=step)
        with Counted() as count:
            out = sharded(batch)
            (out["v"].sum() + out["w"].sum()).backward()
        counts.append(count.ops)
    return counts[2:]


@pytest.mark.parametrize(("ranks", "known", "new"), [(1, 40, 95), (2, 90, 140)])
def test_a_step_asks_as_much_for_any_number_of_tables(ranks, known, new):
    found = [found[0] for found in (on_ranks(ranks, ops_of_steps, tables) for tables in (1, 26, 200))]
    assert max(known for known, _ in found) <= known and max(new for _, new in found) <= new, found
    assert found[2][0] <= found[1][0] + 2 and found[1][0] <= found[0][0] + 2, found
