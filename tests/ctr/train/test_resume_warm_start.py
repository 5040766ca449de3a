"""A new run takes over what fits of a changed model, and says what it took, what starts fresh and what is dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ctr.train.states import SCHEMA, arguments, newest, rows_of_state, tensors_of_state, write_data

#: d is gone, c is called e (one more table of the same column), f is new
CHANGED = SCHEMA.replace(
    "{name: c, kind: id}, {name: d, kind: id}", "{name: c, kind: id, table: e}, {name: f, kind: id}"
)
STEPS = ["trainer.batch_size=100", "trainer.max_steps=8", "model.dropout=0.0"]


@pytest.fixture(scope="module", params=["dynamic", "static"])
def first(request, ranks, tmp_path_factory) -> tuple[str, Path, Path]:
    """Kind of tables, data, and a run of 2 ranks."""
    folder = tmp_path_factory.mktemp("first")
    data = write_data(folder / "data", 1000, extra="f")
    command = arguments(data, folder / "run", *STEPS, *kind_of(request.param))
    assert ranks.run(2, command, folder / "output") == [0, 0], (folder / "output").read_text()
    return request.param, data, folder / "run"


def kind_of(kind: str) -> list[str]:
    adagrad = "optimizer.sparse.name=adagrad"
    return [f"embedding={kind}", adagrad, *(["embedding.rows=200"] if kind == "static" else [])]


def warm(ranks, first, tmp_path, *more: str, status: int = 0) -> str:
    kind, data, _ = first
    path = next((o for o in more if "warm_start.path" in o), f"trainer.warm_start.path={first[2]}")
    command = arguments(data, tmp_path / "run", *STEPS, *kind_of(kind), path, *more)
    command = [CHANGED if part == SCHEMA else part for part in command]
    # The smallest step: what was taken over stays nearly as it was.
    command += ["trainer.max_steps=1", "optimizer.sparse.lr=1e-30", "optimizer.dense.lr=1e-30"]
    output = tmp_path / "output"
    output.unlink(missing_ok=True)
    assert ranks.run(1, command, output) == [status], output.read_text()
    return output.read_text()


def test_tables_and_modules(ranks, first, tmp_path):
    kind, _, run = first
    said = warm(ranks, first, tmp_path, "trainer.warm_start.rename=[c:e]")
    before, after = newest(run), newest(tmp_path / "run")
    old, new = tensors_of_state(before), tensors_of_state(after)
    for name in ("tower/first_order.bias", "tower/mlp.2.weight", "tower/embed.numeric.weight"):
        assert new[name] == old[name]
    assert "step 1 ·" in said and "parameters · kept: " in said
    if kind == "dynamic":
        assert "tables · kept: row, e · fresh: f · dropped: d · optimizer: row, e" in said
        rows, others = rows_of_state(before), rows_of_state(after)
        for here, there in (("row", "row"), ("e", "c")):
            assert others[here].keys() >= rows[there].keys()
            for i, row in rows[there].items():
                assert others[here][i]["values"] == row["values"]
        untouched = [i for i, row in rows["row"].items() if others["row"][i]["count"] == row["count"]]
        assert untouched and all(others["row"][i]["state"] == rows["row"][i]["state"] for i in untouched)
        assert len(others["f"]) <= 100
    else:
        assert "kept: row_v, e_v, row_w, e_w · fresh: f_v, f_w · dropped: d_v, d_w" in said
        assert new["tables/embedding_bags.e_v.weight"] == old["tables/embedding_bags.c_v.weight"]
        assert new["tables/embedding_bags.f_v.weight"] != old["tables/embedding_bags.d_v.weight"]


def test_optimizer_state_is_left_behind_on_request(ranks, first, tmp_path):
    kind, _, run = first
    said = warm(ranks, first, tmp_path, "trainer.warm_start.rename=[c:e]", "trainer.warm_start.optimizer=false")
    assert said.count("optimizer: none") >= 1
    after = newest(tmp_path / "run")
    if kind == "dynamic":
        counts = {i: int.from_bytes(r["count"], "little") for i, r in rows_of_state(after)["row"].items()}
        state = {i: row["state"] for i, row in rows_of_state(after)["row"].items()}
        old = {i: row["count"] for i, row in rows_of_state(newest(run))["row"].items()}
        left = [i for i in old if int.from_bytes(old[i], "little") == counts[i]]
        assert left and all(set(state[i]) == {0} for i in left)


def test_the_best_model_is_a_start_too_and_mistakes_are_told(ranks, first, tmp_path):
    kind, _, run = first
    said = warm(ranks, first, tmp_path, f"trainer.warm_start.path={run}/best", "trainer.warm_start.rename=[c:e]")
    assert f"warm start from {run}/best, step 8" in said and "optimizer: none" in said
    other = tmp_path / "other"
    other.mkdir()
    said = warm(ranks, first, other, "trainer.warm_start.rename=[nobody:e]", status=2)
    assert "trainer.warm_start.rename has 'nobody:e'" in said.splitlines()[-1]
