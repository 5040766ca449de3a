"""Rows of a batch with ids that have no row, against what the look-ups of training must have left."""

import pytest

from tessera.distributed.new_ids import rows_with_new_ids
from tessera.distributed.sharding import shard
from tests.distributed.dictionary import BATCH, Case, Model, draw_bags, rows_of_rank, to_kjt
from tests.ranks import on_ranks

BAGS = (("bag_tables", ("bc",)),)


def flags(process, case: Case) -> dict[int, list[bool]]:
    """For steps seen in training and others, this rank's flags."""
    model = Model(case)
    shard(model, model.tables, process, BATCH // process.world_size)

    def ids(step: int):
        mine = rows_of_rank(process.rank, process.world_size, step)
        return to_kjt([feature[mine] for feature in draw_bags(step, case.longest)], case.weighted)

    for step in (0, 1):
        model.tables.begin_step(now=step)
        model.tables(ids(step))
    before = [len(table) for table in model.tables.owned().values()]
    found = {step: rows_with_new_ids(model.tables, ids(step)).tolist() for step in (0, 1, 4, 5)}
    assert before == [len(table) for table in model.tables.owned().values()]
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", [Case(), Case(options=BAGS, weighted=True)], ids=["rows", "bags"])
def test_flags_are_those_of_a_dictionary(world, case):
    known = {"a": set(), "bc": set()}
    for step in (0, 1):
        for name, feature in zip(("a", "bc", "bc"), draw_bags(step, case.longest), strict=True):
            known[name] |= {i for bag in feature for i, _ in bag}
    results = on_ranks(world, flags, case)
    for step in (0, 1, 4, 5):
        bags = zip(*draw_bags(step, case.longest), strict=True)
        expected = [
            any(i not in known[name] for name, bag in zip(("a", "bc", "bc"), row, strict=True) for i, _ in bag)
            for row in bags
        ]
        found = [flag for result in results for flag in result[step]]
        assert found == expected
        assert any(expected) == (step > 1)


def test_ids_that_wait_for_admission_are_new():
    (result,) = on_ranks(1, flags, Case(threshold=50))
    assert result[5] == [any(row) for row in zip(*draw_bags(5, 3), strict=True)]
