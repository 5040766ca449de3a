"""Sharded tables of low precision: the same bits on 1 and 2 ranks, and ALPT's step against a dense definition."""

import contextlib

import pytest
import torch
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.saved.row_files import rows_of as all_rows
from tessera.distributed.saved.states import open_saved, save
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableParts, describe_tables, load_rows
from tessera.distributed.sharding import shard
from tessera.embedding.config import DynamicTableConfig, Group, key_of
from tessera.embedding.errors import TesseraError
from tessera.embedding.optim import RowOptimizer, ScaleOptimizer
from tessera.kernels.quantise import dequantise, quantise
from tessera.kernels.random import normal, stream
from tests.ranks import on_ranks

SEED, BATCH, IDS = 3, 16, ["a", "b"]
LEARNED = ScaleOptimizer(lr=0.01, weight_decay=0.1, gradient_scale=0.25)
STEP = 2.0**-6


def tables_of(v, w="fp32", learned=None, optimizer="sgd", **more):
    groups = (Group("v", 4, 0.5, v, scale=STEP, learned=learned), Group("w", 1, 0.5, w, scale=STEP))
    optimizer = RowOptimizer(optimizer, lr=0.125, **more)
    return [DynamicTableConfig(name, (name,), groups, optimizer, seed=SEED) for name in IDS]


def draw_ids(step):
    """[features, BATCH], with repeats, new ids in every step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 30, (2, BATCH), generator=generator) * 7919 - 2**60


def kjt(ids_fb):
    return KeyedJaggedTensor(IDS, ids_fb.flatten(), lengths=torch.ones(ids_fb.numel(), dtype=torch.int32))


class Model(torch.nn.Module):
    def __init__(self, tables, transport="fp32"):
        super().__init__()
        self.tables = DynamicTables(tables, IDS, 100, transport=transport)
        self.mix = torch.nn.Parameter(torch.linspace(-1, 1, 10))

    def forward(self, ids):
        out = self.tables(ids)
        return torch.cat([out["v"].flatten(1), out["w"].flatten(1)], 1)


def train_linear(process, tables, transport, folder):
    """Gradients are small integers times a power of two: they sum up to the same in any order."""
    model = Model(tables, transport)
    sharded, _ = shard(model, model.tables, process, BATCH)
    share, outputs = BATCH // process.world_size, []
    mine = slice(process.rank * share, (process.rank + 1) * share)
    for step in range(6):
        generator = torch.Generator().manual_seed(100 + step)
        first, second = torch.randint(-4, 5, (2, BATCH, 10), generator=generator)[:, mine].float()
        learn = model.tables.learns_scales and step % 2 == 0
        model.tables.begin_step(step, learn_scales=learn)
        out = sharded(kjt(draw_ids(step)[:, mine]))
        outputs.append(out.detach())
        ((out * first).sum() * process.world_size / BATCH).backward()
        if learn:
            with model.tables.second_pass():
                ahead = model(kjt(draw_ids(step)[:, mine]))
                outputs.append(ahead.detach())
                ((ahead * second).sum() * process.world_size / BATCH).backward()
    if folder is not None:
        save_rows(model.tables, folder, process)
    return torch.stack(outputs), rows_of(model.tables)


def save_rows(tables, folder, process):
    owned = tables.owned()

    def write(storage):
        TableParts({("rows", name): all_rows(table) for name, table in owned.items()}, {}).write(storage, process)
        return {}

    save(Storage(folder), "state", write, lambda *_: {"tables": describe_tables(owned)}, process)


def rows_of(tables):
    """(table, id) -> all that is exported of the row, as bytes."""
    found = {}
    for name, table in tables.owned().items():
        for batch in table.export_rows():
            for place, i in enumerate(batch.ids.tolist()):
                parts = (batch.values, batch.state, batch.scale, batch.last_seen, batch.count)
                found[name, i] = [
                    part[place].reshape(-1).view(torch.uint8).tolist() for part in parts if part is not None
                ]
    return found


CASES = {
    "fp16": (tables_of("fp16", "fp16"), "fp32"),
    "int8": (tables_of("int8", optimizer="rowwise_adagrad"), "fp32"),
    # Codes times a power of two, and the gradients here, are numbers that bf16 holds.
    "int4, sent as bf16": (tables_of("int4", "int8"), "bf16"),
    "int8 learned": (tables_of("int8", learned=LEARNED, optimizer="adagrad"), "fp32"),
    "int2 learned": (tables_of("int2", "int2", LEARNED, "adam", state_format="bf16"), "fp32"),
}


QUICK = ("int8", "int2 learned")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_one_and_two_ranks_give_the_same_bits(name, tmp_path):
    tables, transport = CASES[name]
    ((one_out, one),) = on_ranks(1, train_linear, tables, transport, None)
    results = on_ranks(2, train_linear, tables, transport, tmp_path)
    assert torch.equal(torch.cat([out for out, _ in results], dim=1), one_out)
    both = {**results[0][1], **results[1][1]}
    assert len(both) == sum(len(rows) for _, rows in results)
    assert both == one
    ((loaded,),) = on_ranks(1, load_all, tables, tmp_path)
    assert loaded == one, "rows come back from files as they were"


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "unit"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_rows_travel_in_half_precision(transport, unit):
    ((exact, _),) = on_ranks(1, train_linear, tables_of("fp32"), transport, None)
    results = on_ranks(2, train_linear, tables_of("fp32"), transport, None)
    found = torch.cat([out for out, _ in results], dim=1)
    assert ((found - exact).abs() <= unit * exact.abs()).all()
    assert not torch.equal(found, exact)


def load_all(process, tables, folder):
    model = Model(tables)
    shard(model, model.tables, process, BATCH)
    load_rows(model.tables.owned(), open_saved(Storage(folder / "state"), process), process)
    return (rows_of(model.tables),)


def load_others(process, tables, folder):
    with pytest.raises(TesseraError) as error:
        load_all(process, tables, folder)
    return str(error.value)


def test_rows_of_another_format_are_refused(tmp_path):
    on_ranks(2, train_linear, tables_of("int8"), "fp32", tmp_path)
    (message,) = on_ranks(1, load_others, tables_of("int4"), tmp_path)
    expected = (
        "rows of table a have v 4 int8, w 1 fp32; the model has v 4 int4, w 1 fp32 (`tessera convert-tables` converts)"
    )
    assert message.endswith(expected)


def train_alpt(process):
    """One dense weight per column, SGD everywhere; the trainer's order of updates. Returns outputs, rows, weights."""
    model = Model(tables_of("int8", learned=LEARNED))
    sharded, _ = shard(model, model.tables, process, BATCH)
    dense, outputs = torch.optim.SGD([model.mix], 0.05), []
    for step in range(4):
        ids = kjt(draw_ids(step))
        model.tables.begin_step(step, learn_scales=True)
        out = (sharded(ids) * model.mix).sum(1)
        outputs.append(out.detach())
        dense.zero_grad()
        out.square().mean().backward()
        dense.step()
        with model.tables.second_pass():
            (model(ids) * model.mix.detach()).sum(1).square().mean().backward()
    found = {}
    for name, table in model.tables.owned().items():
        for batch in table.export_rows():
            for place, i in enumerate(batch.ids.tolist()):
                found[name, i] = table.gather(batch.rows[place : place + 1])[0], batch.scale[place, 0].item()
    return torch.stack(outputs), found, model.mix.detach()


def alpt_by_definition():
    """Forward on D Q; w_new; second forward on D round(w_new / D), autograd to D; Q of w_new by the new D."""
    config, mix = tables_of("int8", learned=LEARNED)[0], torch.linspace(-1, 1, 10)
    rows, steps, outputs = {}, {}, []

    def key(name):
        return key_of(f"{name}_v/rounding")

    def stored(w, d, name, i, step):
        ids, size = torch.tensor([i]), torch.tensor([d])
        codes = quantise(w[None], size, "int8", ids=ids, stream=stream(SEED, key(name), step))
        return dequantise(codes, size, "int8", 4)[0]

    for step in range(4):
        batch = [[(name, i) for i in ids.tolist()] for name, ids in zip(IDS, draw_ids(step), strict=True)]
        for name, i in {pair for column in batch for pair in column}:
            if (name, i) not in rows:
                one = torch.tensor([i])
                v, w = (normal(SEED, key_of(f"{name}_{g.name}"), one, g.dim)[0] * 0.5 for g in config.groups)
                rows[name, i], steps[name, i] = torch.cat([stored(v, STEP, name, i, 0), w]), STEP
        leaves = {pair: rows[pair].clone().requires_grad_() for column in batch for pair in column}
        weights = mix.clone().requires_grad_()

        def forward(values, weights, batch=batch):
            emb = torch.stack([torch.stack([values[pair] for pair in column]) for column in batch], dim=1)
            return (torch.cat([emb[..., :4].flatten(1), emb[..., 4:].flatten(1)], 1) * weights).sum(1)

        out = forward(leaves, weights)
        outputs.append(out.detach())
        out.square().mean().backward()
        mix = mix - 0.05 * weights.grad
        new = {pair: (leaf - 0.125 * leaf.grad).detach() for pair, leaf in leaves.items()}

        sizes = {pair: torch.tensor(steps[pair], requires_grad=True) for pair in new}
        ahead = {}
        for pair, w in new.items():
            d, x = sizes[pair], w[:4] / sizes[pair]
            straight = x + (x.round() - x).detach()
            codes = torch.where((x > -128) & (x < 127), straight, x.detach().clamp(-128, 127).round())
            ahead[pair] = torch.cat([d * codes, w[4:]])
        forward(ahead, mix).square().mean().backward()
        for (name, i), w in new.items():
            d = steps[name, i]
            g = LEARNED.gradient_scale * (sizes[name, i].grad.item() + LEARNED.weight_decay * d)
            steps[name, i] = max(d - LEARNED.lr * g, d / 2)
            rows[name, i] = torch.cat([stored(w[:4], steps[name, i], name, i, step + 1), w[4:]])
    return torch.stack(outputs), {pair: (rows[pair], steps[pair]) for pair in rows}, mix


def test_alpt_equals_its_definition():
    ((outputs, found, mix),) = on_ranks(1, train_alpt)
    expected_outputs, expected, expected_mix = alpt_by_definition()
    torch.testing.assert_close(outputs, expected_outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mix, expected_mix, rtol=1e-4, atol=1e-6)
    assert found.keys() == expected.keys()
    for pair, (row, size) in expected.items():
        assert found[pair][1] == pytest.approx(size, rel=1e-5), pair
        torch.testing.assert_close(found[pair][0], row, rtol=1e-4, atol=1e-5)
    assert any(size != STEP for _, size in expected.values())


def fail_in_second_passes(process, when):
    """Steps of which every other fails in its second pass; gives rows, and what a failed one has left behind."""
    model = Model(tables_of("int8", learned=LEARNED))
    sharded, _ = shard(model, model.tables, process, BATCH)
    for step in range(4):
        ids = kjt(draw_ids(step))
        model.tables.begin_step(step, learn_scales=True)
        sharded(ids).sum().backward()
        with contextlib.suppress(KeyError), model.tables.second_pass():
            if step % 2 and when == "before":
                raise KeyError
            out = model(ids)
            if step % 2 and when == "between":
                raise KeyError
            out.sum().backward()
        if step % 2:  # a step of one pass, which adds ids and updates rows
            before = sum(len(table) for table in model.tables.owned().values())
            model.tables.begin_step(step)
            rows = sharded(kjt(draw_ids(100 + step)))
            rows.sum().backward()
            assert sum(len(table) for table in model.tables.owned().values()) > before
            model.eval()
            assert not torch.equal(model(kjt(draw_ids(100 + step))), rows)
            model.train()
    return rows_of(model.tables)


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_second_pass_that_fails_leaves_nothing_behind(when):
    (rows,) = on_ranks(1, fail_in_second_passes, when)
    assert rows
