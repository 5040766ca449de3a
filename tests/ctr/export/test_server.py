"""The server: answers of the scorer, together; limits; malformed bodies; a model that is followed."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import struct

import numpy as np
import pyarrow as pa
import pytest
import torch.distributed as dist

from tessera.ctr.serving import ExportError, RowError, Scorer
from tessera.ctr.serving.table_files import TableFiles
from tests.ctr.export.asgi import Client, running
from tests.ctr.export.models import awkward_rows, export, make_run, overrides_of
from tests.distributed.saved_tables import alone

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from tessera.ctr.serving.app import Server, Settings
from tessera.ctr.serving.batches import Limits
from tessera.ctr.serving.bodies import ARROW

USER = ("x", "y", "s", "h", "words", "c")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Scorer:
    folder = tmp_path_factory.mktemp("served")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        make_run(alone(), folder, overrides_of(folder, model="fm"))
        export(alone(), folder)
    finally:
        dist.destroy_process_group()
    return Scorer.load(folder / "export")


def rows_of(count: int, seed: int = 0) -> list[dict]:
    return awkward_rows(count, seed).drop_columns(["label", "buy", "price"]).to_pylist()


def serve(scorer: Scorer, test, **limits) -> None:
    """Run a test, a coroutine of a client, on a server of the scorer."""
    limits = {"timeout_seconds": 120.0} | limits  # on a machine with much else to do
    server = Server(scorer, Settings(Limits(**limits)), say=lambda line: None)

    async def run() -> None:
        async with running(server.app()) as client:
            await test(client)

    asyncio.run(run())


def stream_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def ids_asked_for(scorer: Scorer, monkeypatch) -> list[int]:
    """Return a list to which the number of ids of each look-up is added."""
    asked, find = [], TableFiles.find
    monkeypatch.setattr(TableFiles, "find", lambda table, ids: (asked.append(len(ids)), find(table, ids))[1])
    return asked


def test_rows_of_every_form_score_alike_and_a_user_is_looked_up_once(scorer, monkeypatch):
    table = awkward_rows(40, seed=2)
    expected = scorer(table)
    assert np.array_equal(scorer(table.to_batches()[0]), expected)
    of_dicts = scorer(rows_of(40, seed=2))  # their numbers are float64, and rounded behind the transform
    np.testing.assert_allclose(of_dicts, expected, rtol=0, atol=1e-6)
    assert scorer(table.slice(0, 0)).shape == (0,) and scorer([]).shape == (0,)
    assert scorer(rows_of(40, seed=2)[3]).tolist() == of_dicts[3:4].tolist()
    user = {name: value for name, value in rows_of(40, seed=2)[0].items() if name in USER}
    candidates = [{k: v for k, v in row.items() if k not in USER} for row in rows_of(30, seed=4)]
    together = [{**candidate, **user} for candidate in candidates]
    asked = ids_asked_for(scorer, monkeypatch)
    ranked = scorer.rank(user, candidates)
    of_user, items = sum(asked), sum(len(row["tags"] or []) for row in candidates)
    assert of_user < 7 * 30 + items + 50, "the user's ids are asked for once, and those of crosses with it for each"
    assert ranked.tolist() == scorer(together).tolist(), "bit for bit"
    assert scorer.rank(user, []).shape == (0,) == scorer.rank(user, awkward_rows(0)).shape
    assert scorer.rank({}, together).tolist() == ranked.tolist()
    np.testing.assert_allclose(scorer.rank(awkward_rows(1), candidates).shape, (30,))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"x": float("nan")}, "row 1: column 'x' found nan, expected a finite number"),
        ({"c": 1.5}, "column 'c' (read by feature 'c') found double, expected an integer"),
        ({"h": "xyz"}, "row 1: column 'h' found \"'xyz'\", expected 1 to 16 hexadecimal digits"),
        ({"tag_weights": [1.0] * 9}, "row 1: column 'tag_weights' found '9 weights', expected"),
        ({"d": 2**64}, "column 'd' cannot be read"),
        ({"s": "\ud800"}, "column 's' cannot be read"),
        ({"last": "1|a"}, "row 1: column 'last' found"),
    ],
)
def test_a_bad_value_is_one_line_that_names_its_row_and_column(scorer, change, line):
    rows = rows_of(3)
    rows[1] = {**rows[1], **change}
    with pytest.raises(RowError) as error:
        scorer(rows)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_missing_column_is_one_line(scorer):
    rows = rows_of(3)
    del rows[2]["c"]
    with pytest.raises(RowError, match="row 2 has no column 'c'; expected a value, or null where it is missing"):
        scorer(rows)
    with pytest.raises(RowError, match="column 'c' .* found nowhere"):
        scorer(awkward_rows(2).drop_columns(["c"]))
    with pytest.raises(RowError, match="column 'c' is neither the user's nor the candidates'"):
        scorer.rank({"x": 1.0}, [{"d": 3}])


def test_answers_are_the_scorers_in_json_and_arrow_and_name_the_model(scorer):
    table = awkward_rows(25, seed=9)
    expected = scorer(table)

    async def test(client: Client) -> None:
        reply = await client.post("/score", {"rows": rows_of(25, seed=9)})
        assert reply.status == 200 and reply.json()["version"] == scorer.version == reply.headers["x-model-version"]
        np.testing.assert_allclose(reply.json()["scores"], expected, rtol=0, atol=1e-6)
        body = stream_of(table)
        reply = await client.send("POST", "/score", [body[:100], body[100:]], {"content-type": ARROW, "accept": ARROW})
        with pa.ipc.open_stream(reply.body) as stream:
            found = stream.read_all()
        assert found.schema.metadata[b"version"].decode() == scorer.version
        assert np.array_equal(found["label"].to_numpy(), expected)
        user = {name: value for name, value in rows_of(1)[0].items() if name in USER}
        candidates = [{k: v for k, v in row.items() if k not in USER} for row in rows_of(200, seed=4)]
        reply = await client.post("/rank", {"user": user, "candidates": candidates})
        np.testing.assert_allclose(reply.json()["scores"], scorer.rank(user, candidates), rtol=0, atol=1e-6)
        assert (await client.send("GET", "/health")).status == 200
        assert (await client.send("GET", "/ready")).json() == {"version": scorer.version}
        metrics = (await client.send("GET", "/metrics")).body.decode()
        assert (
            'tessera_requests_total{path="/score",status="200"} 2.0' in metrics
            and "tessera_rows_total 250.0" in metrics
        )

    serve(scorer, test)


def test_concurrent_requests_share_passes_and_each_gets_its_own_answer(scorer):
    async def test(client: Client) -> None:
        sizes = [1 + number % 7 for number in range(60)]
        replies = await asyncio.gather(
            *(client.post("/score", {"rows": rows_of(size, seed=number)}) for number, size in enumerate(sizes))
        )
        for number, reply in enumerate(replies):
            expected = scorer(rows_of(sizes[number], seed=number))
            np.testing.assert_allclose(reply.json()["scores"], expected, rtol=0, atol=1e-6)
        metrics = (await client.send("GET", "/metrics")).body.decode()
        passes = next(line for line in metrics.splitlines() if line.startswith("tessera_pass_rows_count"))
        assert float(passes.split()[1]) < 30

    serve(scorer, test, wait_seconds=0.2, batch_rows=100)


def test_limits(scorer):
    async def test(client: Client) -> None:
        reply = await client.send("POST", "/score", b"x" * 30_000, {"content-type": "application/json"})
        assert reply.status == 413
        reply = await client.send("POST", "/score", b"", {"content-length": "9" * 30})
        assert reply.status == 413
        reply = await client.post("/score", {"rows": [{}] * 21})
        assert reply.status == 413 and reply.json()["error"] == "21 rows; expected at most 20"
        late = await asyncio.gather(*(client.send("POST", "/score", [b"{", b""]) for _ in range(3)))
        assert {one.status for one in late} == {400}

    serve(scorer, test, body_bytes=20_000, rows=20)

    async def late(client: Client) -> None:
        assert (await client.send("POST", "/score", [])).status == 408

    serve(scorer, late, timeout_seconds=0.05)


def malformed(count: int, seed: int = 0) -> list[tuple[str, bytes, str]]:
    """path, body and content type of requests that cannot be answered."""
    draw = random.Random(seed)
    rows = rows_of(2)
    good = json.dumps({"rows": rows}).encode()
    arrow = stream_of(awkward_rows(2).drop_columns(["label", "buy", "price"]))
    values = [None, 3, "x", [], {}, [[]], {"a": 1}, 1e400, True, 2**70, "\ud800", [1, "a"], -(2**65), {"": {"": []}}]
    found: list[tuple[str, bytes, str]] = []
    while len(found) < count:
        kind = draw.randrange(7)
        if kind == 0:  # cut off
            found.append(("/score", good[: draw.randrange(len(good))], "application/json"))
        elif kind == 1:
            found.append(("/score", draw.randbytes(draw.randrange(1, 200)), "application/json"))
        elif kind == 2:  # another shape
            value = draw.choice(values)
            body = draw.choice([value, {"rows": value} if value != [] else 1, {"row": rows}, {"rows": [value]}])
            found.append((draw.choice(["/score", "/rank"]), json.dumps(body).encode(), "application/json"))
        elif kind == 3:  # a value of another type
            name = draw.choice(["x", "c", "tags", "words", "h", "last", "tag_weights"])
            wrong = draw.choice([{"a": 1}, [["x"]], [{"a": 1}]])
            body = {"rows": [{**rows[0], name: wrong}]}
            found.append(("/score", json.dumps(body).encode(), "application/json"))
        elif kind == 4:  # Arrow, cut off or with bits turned round behind its schema
            body = bytearray(arrow[: draw.randrange(1, len(arrow) - 8)])
            found.append(("/score", bytes(body), ARROW))
        elif kind == 5:
            depth = draw.randrange(2000, 100_000)
            found.append(("/score", b"[" * depth + b"]" * depth, "application/json"))
        else:
            user = draw.choice(values[:9])
            body = {"user": user, "candidates": draw.choice([value for value in values if value != []])}
            found.append(("/rank", json.dumps(body).encode(), draw.choice(["application/json", "text/csv", ARROW])))
    return found


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_malformed_bodies_are_answered_with_4xx_and_the_server_lives(scorer, count):
    async def test(client: Client) -> None:
        for path, body, kind in malformed(count, seed=count):
            reply = await client.send("POST", path, body, {"content-type": kind})
            assert 400 <= reply.status < 500, (reply.status, reply.body, path, body[:300], kind)
            assert "\n" not in reply.json()["error"]
        assert (await client.post("/score", {"rows": rows_of(2)})).status == 200

    serve(scorer, test)


def test_arrow_with_turned_bits_never_ends_the_server(scorer):
    draw, arrow = random.Random(3), stream_of(awkward_rows(20).drop_columns(["label", "buy", "price"]))

    async def test(client: Client) -> None:
        for _ in range(100):
            body = bytearray(arrow)
            for _ in range(draw.randrange(1, 6)):
                body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
            reply = await client.send("POST", "/score", bytes(body), {"content-type": ARROW})
            assert reply.status < 500, reply.body

    serve(scorer, test)


def with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def amplified() -> dict[str, pa.Table]:
    """Small tables whose columns are large when they are decoded: one value stands in each row."""
    rows = 900
    table = awkward_rows(1).drop_columns(["label", "buy", "price"]).take([0] * rows)
    codes = pa.array(np.zeros(rows, np.int8))

    def repeated(value: pa.Array) -> pa.Array:
        return pa.DictionaryArray.from_arrays(codes, value)

    begins, lengths = pa.array(np.zeros(rows, np.int32)), pa.array(np.full(rows, 5000, np.int32))
    view = struct.pack("<i4sii", 30_000, b"1|1|", 0, 0) * rows
    texts = pa.Array.from_buffers(pa.string_view(), rows, [None, pa.py_buffer(view), pa.py_buffer(b"1|" * 15_000)])
    lists = pa.ListViewArray.from_arrays(begins, lengths, pa.array(np.ones(5000, np.int64)))
    return {
        "text": with_column(table, "last", repeated(pa.array(["1|" * 20_000]))),
        "list": with_column(table, "words", repeated(pa.array([["w" * 10] * 3000]))),
        "views of lists": with_column(table, "tags", lists),
        "views of text": with_column(table, "last", texts),
    }


@pytest.mark.parametrize("kind", ["text", "list", "views of lists", "views of text"])
def test_a_value_that_stands_in_many_rows_counts_in_each(scorer, kind):
    body = stream_of(amplified()[kind])

    async def test(client: Client) -> None:
        reply = await client.send("POST", "/score", body, {"content-type": ARROW})
        assert reply.status == 413 and "stand for more than is allowed" in reply.json()["error"], reply.body
        small = stream_of(with_column(awkward_rows(3), "last", pa.array(["1|2", None, "1|2"]).dictionary_encode()))
        assert (await client.send("POST", "/score", small, {"content-type": ARROW})).status == 200

    serve(scorer, test, body_bytes=len(body))


def test_columns_of_many_types_are_read_or_refused(scorer):
    """Missing, null, twice, of other types: each is an answer or one line."""
    table, kinds = awkward_rows(5).drop_columns(["label", "buy", "price"]), [pa.null(), pa.large_string(), pa.binary()]
    kinds += [pa.float16(), pa.decimal256(60, 2), pa.duration("s"), pa.timestamp("ns"), pa.list_(pa.list_(pa.int64()))]
    kinds += [pa.map_(pa.string(), pa.int64()), pa.struct([("a", pa.int64())]), pa.list_(pa.float64(), 3), pa.uuid()]
    kinds += [pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int8(), pa.null()), pa.list_view(pa.int64())]
    kinds += [pa.run_end_encoded(pa.int32(), pa.int64()), pa.list_(pa.string_view()), pa.large_list(pa.string())]
    found = set()

    async def test(client: Client) -> None:
        for name in ("x", "c", "s", "tags", "last"):
            changed = [with_column(table, name, pa.nulls(5, kind)) for kind in kinds]
            for one in (*changed, table.drop_columns([name]), table.append_column(name, table[name])):
                reply = await client.send("POST", "/score", stream_of(one), {"content-type": ARROW})
                found.add(reply.status)
                assert reply.status in (200, 422), (reply.body, one.schema.field(name) if name in one.schema else name)
        for one in (
            pa.table({}),
            pa.table({"x": pa.nulls(3)}),
            table.append_column("more", pa.array([{"a": [1]}] * 5)),
        ):
            found.add((await client.send("POST", "/score", stream_of(one), {"content-type": ARROW})).status)

    serve(scorer, test)
    assert found == {200, 422}


@pytest.mark.parametrize("depth", [3, 900])
def test_values_of_many_levels_are_refused_before_they_are_read(scorer, depth):
    async def test(client: Client) -> None:
        for name in ("x", "tags"):
            for value in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
                body = json.dumps({"rows": [{**rows_of(1)[0], name: 12345}]}).replace("12345", value).encode()
                reply = await client.post("/score", body)
                assert reply.status == 422 and f"row 0: column '{name}' found" in reply.json()["error"], reply.body
        reply = await client.post("/score", b'{"rows": [' + b"[" * depth + b"]" * depth + b"]}")
        assert reply.status == 422 and "row 0 is" in reply.json()["error"]

    serve(scorer, test)


def test_an_answer_that_is_no_number_is_told_and_others_are_answered(scorer, monkeypatch):
    predict = Scorer.predict_with_hidden

    def overflowing(self, inputs):
        found = predict(self, inputs)
        for one, (scores, _) in zip(inputs, found, strict=True):
            scores[one.numeric[:, 0].numpy() == 123] = np.nan
        return found

    monkeypatch.setattr(Scorer, "predict_with_hidden", overflowing)

    async def test(client: Client) -> None:
        rows = rows_of(3)
        bad = [rows[0], {**rows[1], "x": 123}]
        replies = await asyncio.gather(*(client.post("/score", {"rows": some}) for some in (rows, bad)))
        assert [reply.status for reply in replies] == [200, 422]
        assert replies[1].json()["error"].startswith("row 1: the model's answer is nan, no number")

    serve(scorer, test)


def test_another_path_method_or_encoding_is_one_line_too(scorer):
    async def test(client: Client) -> None:
        assert (await client.post("/nothing", {})).json() == {"error": "POST /nothing: Not Found"}
        reply = await client.post("/score", b"", **{"content-encoding": "gzip"})
        assert (reply.status, reply.json()["error"]) == (415, "content encoding 'gzip'; expected none")
        reply = await client.send("GET", "/score")
        assert reply.status == 405 and reply.headers["allow"] == "POST" and "error" in reply.json()

    serve(scorer, test)


@pytest.mark.parametrize("times", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_any_file_is_found_or_changes_a_value_alone(scorer, tmp_path, times):
    """Without reading all tables, a damaged one is told where it leads nowhere; nothing else is raised."""
    draw, folder, rows = random.Random(5), tmp_path / "export", awkward_rows(60)
    shutil.copytree(scorer.folder, folder)
    ids = [np.arange(-40, 60), draw.getrandbits(63) + np.arange(9)]
    for path in (one for one in [*scorer.manifest["files"], "manifest.json"]):
        content, is_table = (folder / path).read_bytes(), path.startswith("tables/")
        for number in range(times * 3 if is_table else times):
            damaged = bytearray(content)
            damaged[draw.randrange(len(damaged) if number % 2 else min(128, len(damaged)))] ^= 1 << draw.randrange(8)
            (folder / path).write_bytes(damaged)
            with pytest.raises(ExportError):
                Scorer.load(folder, check=True)
            if is_table:
                table = next(one for one in scorer.description.tables if path.startswith(one.folder + "/"))
                try:
                    opened = TableFiles(str(folder), table)
                    for some in ids:
                        found = opened.find(some)
                        opened.read(found[found >= 0], 0)
                except ExportError as error:
                    assert "\n" not in str(error)
        (folder / path).write_bytes(content)
    assert Scorer.load(folder, check=True)(rows).tolist() == scorer(rows).tolist()
