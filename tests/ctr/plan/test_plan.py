"""`tessera plan`: what it says of tables and ranks, files of statistics, and mistakes."""

from __future__ import annotations

import json
import re

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.network import build_tower, fields_of
from tessera.ctr.plan.estimate import BOUNDS, Planner
from tessera.ctr.plan.hardware import NUMBERS, PRESETS, hardware
from tessera.ctr.plan.statistics import from_file
from tessera.ctr.plan.tower_cost import cost_of
from tessera.ctr.tables import build_tables
from tessera.embedding.errors import ConfigError
from tessera.scripts.plan import main
from tests.ctr.plan.data import BATCH, ROWS, statistics_of, write
from tests.ranks import ROOT

SMALL = ["model.hidden=[16]", "model.embedding_dim=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return [*write(tmp_path_factory.mktemp("plan")), *SMALL]


def planner(arguments: list[str], **options) -> Planner:
    config = load_config(arguments, "")
    return Planner(config, Schema(config.data.schema), statistics_of(arguments), PRESETS["h100"], 8, **options)


def test_a_row_is_what_tables_say_that_it_is(data):
    arguments = [*data, "embedding.format=int8", "embedding.alpt.every=4", "optimizer.sparse.name=adam"]
    made = planner(arguments)
    config = made.config
    tables = build_tables(config, made.schema, build_tower(config, made.schema), 4)
    plan = made.plan(4)
    for one, table in zip(plan.tables, tables.tables, strict=True):
        assert one.values + one.state + one.bookkeeping == one.size.row_bytes == table.bytes_per_row
    assert plan.table_bytes * 4 == sum(one.size.rows * one.size.row_bytes for one in plan.tables)


def test_statistics_count_ids_and_rows(data):
    known = statistics_of(data, batches=ROWS // BATCH)
    assert list(known.tables) == ["user", "item", "shop", "tags"]
    assert known.tables["user"].ids == 1 and known.tables["item"].ids == pytest.approx(4, rel=0.05)  # a bag of 0 to 6
    for table in known.tables.values():
        assert table.in_batch.rows == BATCH and table.in_sample.rows == ROWS
        assert table.distinct(BATCH / 2) < table.distinct(BATCH) < table.distinct(BATCH * 2)
    assert known.tables["tags"].distinct(10**9) == pytest.approx(700, rel=0.02)


def test_limits_of_tables_bound_their_rows(data):
    plan = planner([*data, "embedding.max_rows=6000", "embedding.eviction=lru"], samples=10**7).plan(2)
    assert max(table.size.rows for table in plan.tables) == 6000


def test_a_batch_is_shared_out_or_grows(data):
    shared, grown = planner(data), planner(data, rows_per_rank=60)
    assert [shared.plan(ranks).rows for ranks in (1, 4, 16)] == [960, 240, 60]
    assert [grown.plan(ranks).rows for ranks in (1, 4, 16)] == [60, 60, 60]
    asked = [sum(table.distinct for table in grown.plan(ranks).tables) for ranks in (1, 4, 256)]
    assert asked[0] == asked[1] == asked[2]
    pooled = planner([*data, "embedding.pooled_output_dist=auto", "trainer.batch_size=1"], rows_per_rank=60).plan(2)
    assert [table.size.summed_by_owner for table in pooled.tables] == [False, False, False, True]
    owned = [sum(table.owned for table in shared.plan(ranks).tables) for ranks in (1, 4)]
    assert owned[0] == pytest.approx(4 * owned[1])


def test_what_bounds_a_step_is_what_it_takes_longest(data):
    far = planner(data)
    far.hardware = hardware("h100", ["between_us=5"])
    plan = far.plan(1024)
    assert plan.hosts == 128 and plan.bound == "latency" and plan.step_ms >= plan.ms["latency"]
    slow = planner([*data, "model.hidden=[64]"])
    slow.hardware = hardware("h100", ["tflop_s_tf32=0.000001"])
    assert slow.plan(1).bound == "tower"


def test_a_tower_costs_three_passes_of_its_matrices():
    config = load_config(
        ["data=criteo", "data.path=/x", "model=dnn", "model.hidden=[32,8]", "model.embedding_dim=4"], ""
    )
    schema = Schema(config.data.schema)
    cost = cost_of(build_tower(config, schema), fields_of(config, schema))
    inputs = 4 * (len(schema.numeric_names) + len(schema.id_names))
    assert cost.flops == pytest.approx(3 * 2 * (inputs * 32 + 32 * 8 + 8))
    assert cost.norms == ()


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    return (status, *capsys.readouterr())


def test_it_prints_tables_collectives_and_ranks_and_draws(data, tmp_path, capsys):
    file, picture = tmp_path / "known.json", tmp_path / "plan.svg"
    options = ["--ranks", "12", "--ranks-per-host", "4", "--device", "h200", "--set", "between_us=9"]
    written = ["--write-statistics", str(file), "--output", str(picture), "--batches", "4"]
    status, out, _ = run(capsys, *data, *options, *written)
    assert status == 0
    ranks = [
        int(one.replace(",", "")) for one in re.findall(r"^ *([\d,]+) +[\d,]+ +[\d,]+ +[\d.]+ [KMG]?i?B", out, re.M)
    ]
    assert ranks == sorted([*(2**power for power in range(11)), 12])
    assert all(f"\n{name}" in out for name in ("user", "tags", "ids", "rows", "gradients", "dense gradients"))
    assert all(name in out for name in BOUNDS) and "not measured" in out
    assert picture.read_text().startswith("<?xml") and file.stat().st_size < 20_000
    again = run(capsys, *data, "data.path=/nowhere", *options, "--statistics", str(file))
    assert again[:2] == (0, out.removeprefix(f"statistics: {file}\n").removesuffix(f"picture: {picture}\n"))


def test_statistics_are_the_same_behind_a_file(data, tmp_path):
    known, schema = statistics_of(data), Schema(load_config(data, "").data.schema)
    known.to_file(tmp_path / "known.json")
    read = from_file(tmp_path / "known.json", schema)
    for name, table in known.tables.items():
        for rows in (10, BATCH, 10 * BATCH, 10**6):
            assert read.tables[name].distinct(rows) == pytest.approx(table.distinct(rows), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--device", "h10"], "--device is 'h10'; did you mean h100?"),
        (["--device", "x"], "--device is 'x'; expected cpu, a100, h100, h200"),
        (["--set", "memory_gbs=3"], "--set memory_gbs=3: no such number of a device; did you mean memory_gb_s?"),
        (["--set", "memory_gb_s=fast"], "--set memory_gb_s=fast: found 'fast', expected a number above 0"),
        (["--ranks", "12"], "--ranks is 12; expected a multiple of --ranks-per-host 8"),
        (["--ranks", "0"], "--ranks is 0; expected at least 1"),
        (["--ranks", "1000000000000"], "--ranks is 1000000000000; expected at most 1048576"),
        (["--batches", "99999999999999999999"], "--batches is 99999999999999999999; expected at most"),
        (["--rows-per-rank", "99999999999999999999"], "--rows-per-rank is 99999999999999999999; expected at most"),
        (["--samples", "99999999999999999999"], "--samples is 99999999999999999999; expected at most"),
        (["--write-statistics", "/"], "--write-statistics / is a folder; expected the name of a file"),
        (["--output", "plan.pdf"], "--output plan.pdf: expected a name that ends in .svg or .png"),
        (["--output", "nowhere/plan.svg"], "--output nowhere/plan.svg: no folder nowhere"),
        (["--statistics", "nowhere.json"], "--statistics nowhere.json: No such file or directory"),
        (["data.train=null"], "data.train is null and there is no --statistics; a plan needs the data or statistics"),
        (
            ["data.path=/none"],
            "/none/train: not found, expected a folder with parquet files or a parquet file; or plan",
        ),
        (["embedding=static"], "embedding.kind is static; tessera plan knows the traffic of dynamic tables alone"),
        (["--batches", "1", "embedding.max_rows=100"], "table user: max_rows"),
    ],
)
def test_a_mistake_is_one_line(data, options, line, capsys):
    status, _, said = run(capsys, *data, *options)
    assert status == 2 and said.count("\n") == 1 and said.startswith(f"error: {line}"), said


def test_statistics_of_other_tables_are_one_line(data, tmp_path, capsys):
    file = tmp_path / "known.json"
    statistics_of(data).to_file(file)
    whole = json.loads(file.read_text())
    whole["tables"]["users"] = whole["tables"].pop("user")
    file.write_text(json.dumps(whole))
    status, _, said = run(capsys, *data, "--statistics", str(file))
    assert status == 2 and said == f"error: --statistics {file} knows nothing of table 'user'; did you mean 'users'?\n"
    file.write_text(json.dumps(whole | {"version": 0}))
    status, _, said = run(capsys, *data, "--statistics", str(file))
    assert status == 2 and "is not of the form" in said and said.count("\n") == 1


@pytest.mark.parametrize("number", ["Infinity", "NaN", "-1", "1e400", "1" + "0" * 400, '"3"', "null", "[]"])
@pytest.mark.parametrize("place", ["rows", "ids_per_row", "in_batch", "in_sample", "times", "count"])
def test_numbers_that_count_nothing_are_one_line(data, tmp_path, place, number):
    file, schema = tmp_path / "known.json", Schema(load_config(data, "").data.schema)
    statistics_of(data).to_file(file)
    whole = json.loads(file.read_text())
    user = whole["tables"]["user"]
    holders = {"rows": (whole, "rows"), "ids_per_row": (user, "ids_per_row")}
    holders |= {key: (user[key], "rows") for key in ("in_batch", "in_sample")}
    pair = user["in_sample"]["ids_in_so_many_rows"][0]
    holder, key = (holders | {"times": (pair, 0), "count": (pair, 1)})[place]
    holder[key] = "HERE"
    file.write_text(json.dumps(whole).replace('"HERE"', number))
    with pytest.raises(ConfigError, match="is not of the form that --write-statistics of this version writes"):
        from_file(file, schema)


def test_a_file_of_statistics_that_is_nested_too_deep_is_one_line(data, tmp_path):
    file = tmp_path / "known.json"
    file.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not of the form"):
        from_file(file, Schema(load_config(data, "").data.schema))


def test_the_page_shows_what_it_prints_and_names_every_number(data, capsys):
    page = (ROOT / "docs/plan.md").read_text()
    _, out, _ = run(capsys, *data, "--batches", "2")
    heads = [line for line in out.splitlines() if re.match(r"table  |what  | ranks hosts", line)]
    assert len(heads) == 3 and all(head in page for head in heads)
    assert all(f"`{name}`" in page for name in (*NUMBERS, *BOUNDS)) and all(name in page for name in PRESETS)
