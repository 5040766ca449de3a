"""The claims: what differences say, the page, that a stopped run goes on, and rows drawn with a truth of their own."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from tessera.ctr.config import load_config
from tessera.scripts.bench.claims import bench as claims
from tessera.scripts.bench.claims import teachers
from tessera.scripts.bench.claims.__main__ import CLAIMS
from tessera.scripts.bench.claims.bench import Arm, Bench, Row, Rows
from tessera.scripts.bench.claims.page import HEAD, Shown, System, page
from tessera.scripts.bench.claims.paired import paired, verdict, written
from tessera.scripts.bench.claims.teachers import Teacher
from tessera.scripts.bench.claims.text import SYSTEMS
from tessera.scripts.bench.fits import Fits


def test_the_interval_is_that_of_students_t():
    found = paired([0.803, 0.805, 0.804], [0.800, 0.801, 0.799])
    assert found.mean == pytest.approx(0.004) and found.each == pytest.approx((0.003, 0.004, 0.005))
    assert found.half == pytest.approx(4.303 * 0.001 / math.sqrt(3), rel=1e-3)
    assert written(found) == "+0.0040 ± 0.0025 (+0.0030, +0.0040, +0.0050)"
    with pytest.raises(ValueError, match="at least one"):
        paired([], [])


@pytest.mark.parametrize(
    ("better", "margin", "said"),
    [
        ([0.003, 0.004, 0.005], None, "holds"),
        ([0.001, 0.004, 0.009], None, "in every seed"),
        ([-0.001, 0.004, 0.009], None, "not told apart"),
        ([-0.003, -0.004, -0.005], None, "the other way"),
        ([-0.0003, -0.0004, -0.0005], 0.001, "holds"),
        ([-0.003, -0.004, -0.005], 0.001, "the other way"),
        ([0.0013, -0.0010, -0.0016], 0.001, "on the mean"),
        ([0.003], None, "in every seed"),
    ],
)
def test_a_verdict_is_of_the_whole_interval(better, margin, said):
    assert verdict(paired(better, [0.0] * len(better)), margin) == said


def test_the_page_has_a_line_for_each_claim_and_says_what_was_not_run():
    rows = [
        Row("A above B", "+0.01", "here", "A 0.8, B 0.7", "+0.1", "holds"),
        claims.absent("C", "", "there", "not run"),
    ]
    text = page({System("Name (paper)", "Before.", "After."): Shown(rows, 120.0, 9, 2)}, "# Claims")
    assert text.split("\n\n") == [
        "# Claims",
        "## Name (paper)",
        "Before.",
        f"{HEAD}\n|---|---|---|---|---|---|\n"
        "| A above B | +0.01 | here | A 0.8, B 0.7 | +0.1 | **holds** |\n"
        "| C |  | there |  |  | not run |",
        "After.",
        "Fits: 2 min of one core. Of 9 that could stop early, 2 used all of their passes.",
        "All fits together: 2 min of one core.\n",
    ]
    assert set(SYSTEMS) == set(CLAIMS)


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    made, stop_at = [], [4]

    def fitted(self, rows, own, before, seed):
        if len(made) == stop_at[0]:
            raise KeyboardInterrupt
        made.append((seed, before, own[-2:]))
        rate = [float(one.split("=")[1]) for one in own if one.startswith("optimizer.sparse.lr=")][-1]
        return {
            "watched": -abs(rate - 0.02),
            "epochs": 3 + ("model=b" in own),
            "auc": 0.7 + 0.01 * ("model=b" in own) + 0.001 * seed,
        }

    monkeypatch.setattr(Bench, "_fitted", fitted)
    rows = Rows("drawn", lambda seed, folder: None, ("trainer.epochs=4",), {"rows": 5})
    grid = {"optimizer.sparse.lr": (0.01, 0.02)}
    first = Arm("A", ("model=a",), grid)
    second = Arm("B", ("model=b",), grid, after=first)

    ended: list[bool] = []

    def compared(*, read_only: bool = False) -> Row:
        bench = Bench(Fits(tmp_path / "fits", read_only=read_only), None, tmp_path, [1, 2])
        row = bench.compared("B above A", "", rows, second, first)
        ended[:] = bench.to_the_end.values()
        return row

    with pytest.raises(KeyboardInterrupt):
        compared()
    assert len(made) == 4 and compared(read_only=True).holds == "not run"
    stop_at[0] = 100
    row = compared()
    # of each arm two settings and two seeds, none of them twice; B begins with A as A was tuned
    assert len(made) == 8 and len({str(one) for one in made}) == 8
    assert [one[0] for one in made if one[1]] == [0, 0, 1, 2]
    assert all(one[1] == ["model=a", "optimizer.sparse.lr=0.02"] for one in made if one[1])
    assert row.difference == "+0.0100 ± 0.0000 (+0.0100, +0.0100)" and row.holds == "holds"
    assert compared(read_only=True) == row and len(made) == 8
    assert sorted(ended) == [False] * 4 + [True] * 4  # A could have had one pass more


def test_a_data_set_that_is_not_there_is_said_on_its_line(tmp_path):
    rows = Rows("real", lambda seed, folder: None, (), {}, needs=tmp_path / "log.csv")
    row = Bench(Fits(tmp_path), None, tmp_path, [1]).compared("B above A", "", rows, Arm("B", ()), Arm("A", ()))
    assert row.holds == f"{tmp_path / 'log.csv'} is not there"


def test_rows_of_a_teacher_are_drawn_by_the_seed_and_read_by_their_overrides(tmp_path):
    teacher = Teacher(rows=4000, fields=8, shares={"first": 0.5, "neighbours": 0.5})
    best = [teachers.write(teacher, seed, tmp_path / name) for seed, name in ((1, "a"), (1, "b"), (2, "c"))]
    tables = [pq.read_table(tmp_path / name / "train") for name in "abc"]
    assert best[0] == best[1] != best[2] and tables[0].equals(tables[1]) and not tables[0].equals(tables[2])
    assert 0.75 < min(best) < max(best) < 0.95
    assert tables[0].num_rows == 2800 and tables[0].column_names == ["label", *teachers.names(teacher)]
    config = load_config(["data=synthetic", f"data.path={tmp_path / 'a'}", *teachers.overrides(teacher)], "")
    assert [one.name for one in config.data.schema.features] == teachers.names(teacher)


def test_three_neighbours_say_nothing_two_at_a_time():
    teacher = Teacher(rows=50_000, ids=10)
    random = np.random.default_rng(0)
    ids = random.integers(0, teacher.ids, (teacher.fields, teacher.rows))
    part = teachers._parts(teacher, ids, random)["neighbours"]
    for i, j in ((0, 1), (2, 3), (1, 5)):
        of_pair = ids[i] * teacher.ids + ids[j]
        means = np.bincount(of_pair, part) / np.bincount(of_pair)
        assert means.std() < 0.1 * part.std()


def test_steps_say_nothing_one_id_at_a_time_and_leave_the_other_parts_as_they_are():
    plain, stepped = Teacher(rows=20_000, ids=10), Teacher(rows=20_000, ids=10, shares={"first": 0.5, "steps": 0.5})
    ids = np.random.default_rng(0).integers(0, plain.ids, (plain.fields, plain.rows))
    parts = [teachers._parts(one, ids, np.random.default_rng([1, 77])) for one in (plain, stepped)]
    assert all((parts[0][name] == parts[1][name]).all() for name in parts[0] if name != "steps")
    steps = parts[1]["steps"]
    assert not parts[0]["steps"].any() and steps.std() > 0.5
    for column in ids:
        means = np.bincount(column, steps) / np.bincount(column)
        assert means.std() < 0.1 * steps.std()
