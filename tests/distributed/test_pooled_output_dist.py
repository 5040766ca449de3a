"""Bags that travel as sums of owners: the same numbers as rows that are pooled where they are asked for."""

import dataclasses

import pytest

from tessera.distributed.plan import sums_are_smaller
from tests.distributed.dictionary import Case, Reference, joined, same, train
from tests.ranks import on_ranks

LONG = {
    "sum": Case(longest=9),
    "mean": Case(longest=9, averaged=("a", "c")),
    "weighted": Case(longest=9, weighted=True, averaged=("b",)),
    "others": Case(longest=4, oov="learned", threshold=8, weighted=True, averaged=("c",)),
}


def on_path(case: Case, tables: tuple[str, ...]) -> Case:
    return dataclasses.replace(case, options=(("bag_tables", tables),))


def trained(process, cases):
    return [train(process, case) for case in cases]


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("sum", 1),
        ("mean", 1),
        ("weighted", 1),
        ("others", 1),
        ("weighted", 2),
        ("others", 2),
        ("mean", 3),
        pytest.param("sum", 3, marks=pytest.mark.slow),
    ],
)
def test_it_equals_the_path_of_rows_and_autograd(name, world):
    case = LONG[name]
    cases = [case, on_path(case, ("a", "bc"))]
    rows, sums = (joined(results) for results in zip(*on_ranks(world, trained, cases), strict=True))
    for key, (values, *_) in rows["rows"].items():
        assert sums["rows"][key][0] == pytest.approx(values, rel=1e-6, abs=1e-6)
    same(sums, rows)
    same(sums, Reference(case).train())


def test_tables_on_different_paths():
    cases = [on_path(LONG["others"], (table,)) for table in ("a", "bc")]
    for results in zip(*on_ranks(2, trained, cases), strict=True):
        same(joined(results), Reference(LONG["others"]).train())


@pytest.mark.parametrize("transport", ["fp16", "bf16"])
def test_half_precision_transport(transport):
    case = on_path(dataclasses.replace(LONG["mean"], transport=transport), ("a", "bc"))
    same(joined(on_ranks(2, train, case)), Reference(case).train(), rel=0.1, absolute=0.1)


def test_the_plan_says_which_path_a_table_takes():
    ((result,),) = zip(on_ranks(1, train, on_path(LONG["sum"], ("bc",))), strict=True)
    marked = [line.split()[0] for line in result["plan"].splitlines() if line.endswith("(bags summed by owners)")]
    assert marked == ["bc"]


def test_the_rule_counts_the_bytes_that_travel():
    def pays(**changes) -> bool:
        numbers = {"bags": 1000, "ids": 50_000, "rows": 10**6, "width": 16, "ranks": 4}
        return sums_are_smaller(**{**numbers, **changes})

    assert pays()  # 50 rows per bag against 4 sums
    assert not pays(ranks=1)  # nothing travels
    assert not pays(ranks=64)
    assert not pays(ids=1000)  # one id per bag
    assert not pays(rows=2000)  # the same ids again and again: each travels once as a row
    # By hand: 8 * 50,000 + 8 * 16 * 1000 * 4 bytes against (12 + 128) * 48,770.6 distinct ids.
    assert pays(ranks=50) and not pays(ranks=51)  # 6,427,880 left for sums of 128,000 a rank
