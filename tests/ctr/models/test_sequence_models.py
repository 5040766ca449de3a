"""Models of sequences against slow float64 versions, row by row, and what must not change their logits."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tessera.ctr.config import load_config
from tessera.ctr.instantiate import instantiate
from tessera.ctr.models.dare import best
from tessera.ctr.models.numeric import ScaledVectors
from tessera.ctr.models.sequences import Dice, mean_of_events, sum_of_events
from tessera.ctr.models.tower import Events, Fields, SequenceGroup
from tessera.embedding.errors import ConfigError

LENGTH = 6
GROUP = SequenceGroup("h", ("items", "ages"), ("prices",), (1, None), LENGTH)
FIELDS = Fields(("x",), ("user", "item"), ScaledVectors, sequences=(GROUP,))
LENGTHS = [0, 1, 2, LENGTH, 3]
SMALL = {
    "bst": {"embedding_dim": 3, "width": 6, "heads": 2, "feed_forward": 5, "layers": 2, "hidden": [5]},
    "dien": {"embedding_dim": 3, "hidden": [5], "attention_hidden": [4], "auxiliary_hidden": [3]},
    "din": {"embedding_dim": 3, "hidden": [5], "attention_hidden": [4]},
    "dare": {"embedding_dim": 3, "attention_dim": 2, "hidden": [5], "top_k": 20},
    "hstu": {"embedding_dim": 3, "width": 6, "heads": 2, "qk_dim": 2, "v_dim": 3, "preprocessor": 4, "head_hidden": 4},
}


def tower_of(model: str, **changes):
    torch.manual_seed(3)
    config = dict(load_config([f"model={model}"], "").model) | SMALL[model] | changes
    tower = instantiate(config, "model", FIELDS).double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return tower


def inputs(tower, lengths=tuple(LENGTHS), seed=4):
    torch.manual_seed(seed)
    rows, count, dims = len(lengths), sum(lengths), tower.embedding_dims
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    embeddings = {group: draw(rows, 2, dim) for group, dim in dims.items()}
    of = {group: {name: draw(count, dim) for name in GROUP.ids} for group, dim in dims.items()}
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return draw(rows, 1), embeddings, {"h": Events(offsets, of, {"prices": draw(count).detach()})}


def leaves(numeric, embeddings, events):
    return [numeric, *embeddings.values(), *(rows for of in events["h"].embeddings.values() for rows in of.values())]


def row_of(numeric, embeddings, events, b):
    """Return x, emb and the events of one row, by group and by number."""
    one = events["h"]
    here = slice(int(one.offsets[b]), int(one.offsets[b + 1]))
    of = {group: {name: rows[here] for name, rows in found.items()} for group, found in one.embeddings.items()}
    return numeric[b], {group: rows[b] for group, rows in embeddings.items()}, of, one.numbers["prices"][here]


def vectors(emb, of, prices):
    """Return the events' vectors, and the target's: items and ages side by side, then the price."""
    k = torch.cat([of["items"], of["ages"], prices[:, None]], 1)
    return k, torch.cat([emb[1], torch.zeros_like(emb[1]), emb.new_zeros(1)])


def flat(tower, x, emb):
    return torch.cat([x[0] * tower.embed.numeric.weight[0], emb[0], emb[1]])


def din(tower, numeric, embeddings, events):
    dice = [layer for layer in tower.attention[0].score if isinstance(layer, Dice)][0]
    first, last = tower.attention[0].score[0], tower.attention[0].score[2]
    rows = [row_of(numeric, embeddings, events, b) for b in range(len(numeric))]
    hidden = []
    for _, emb, of, prices in rows:
        k, q = vectors(emb["v"], of["v"], prices)
        hidden += [first(torch.cat([q, one, q - one, q * one])) for one in k]
    s = torch.stack(hidden)
    p = torch.sigmoid((s - s.mean(0)) / torch.sqrt(s.var(0, unbiased=False) + 1e-8))
    weights = last(p * s + (1 - p) * dice.alpha * s)[:, 0]
    logits, first_event = [], 0
    for x, emb, of, prices in rows:
        k, _ = vectors(emb["v"], of["v"], prices)
        w = weights[first_event : first_event + len(k)]
        first_event += len(k)
        if tower.attention[0].softmax:
            w = torch.softmax(w, 0)
        o = sum((w[i] * k[i] for i in range(len(k))), torch.zeros_like(vectors(emb["v"], of["v"], prices)[1]))
        logits.append(tower.mlp(torch.cat([flat(tower, x, emb["v"]), o])))
    return torch.cat(logits)


def dare(tower, numeric, embeddings, events):
    logits = []
    for b in range(len(numeric)):
        x, emb, of, prices = row_of(numeric, embeddings, events, b)
        r, target = vectors(emb["r"], of["r"], prices)
        wanted = [emb["a"][1], tower.wanted[0]]
        score = [
            sum(w @ of["a"][name][i] for w, name in zip(wanted, GROUP.ids, strict=True)) / math.sqrt(2)
            for i in range(len(r))
        ]
        kept = sorted(range(len(r)), key=lambda i: -float(score[i].detach()))[: tower.top_k]
        total = sum(torch.exp(score[i]) for i in kept)
        h = sum((torch.exp(score[i]) / total * r[i] for i in kept), torch.zeros_like(target))
        mean = sum((one for one in r), torch.zeros_like(target)) / max(1, len(r))
        logits.append(tower.mlp(torch.cat([flat(tower, x, emb["r"]), h, target * h, mean])))
    return torch.cat(logits)


def bst(tower, numeric, embeddings, events):
    logits = []
    for b in range(len(numeric)):
        x, emb, of, prices = row_of(numeric, embeddings, events, b)
        k, q = vectors(emb["v"], of["v"], prices)
        tokens = torch.stack([tower.of_token(one) for one in [q, *k.flip(0)]])
        tokens = tokens + tower.position[: len(tokens)]
        for layer in tower.layers:
            tokens = bst_layer(layer, tokens)
        absent = [torch.zeros_like(tokens[0])] * (LENGTH + 1 - len(tokens))
        states = [*tokens, *absent] if tower.concat else [tokens[0]]
        logits.append(tower.mlp(torch.cat([flat(tower, x, emb["v"]), *states])))
    return torch.cat(logits)


def bst_layer(layer, x):
    q, k, v = (one.chunk(layer.heads, 1) for one in layer.qkv(x).chunk(3, 1))
    heads = [
        torch.stack([torch.softmax(k[h] @ one / math.sqrt(q[h].shape[1]), 0) @ v[h] for one in q[h]])
        for h in range(layer.heads)
    ]
    s = layer.of_attention(x + layer.output(torch.cat(heads, 1)))
    hidden = layer.first(s)
    return layer.of_feed_forward(s + layer.second(torch.where(hidden > 0, hidden, 0.01 * hidden)))


def hstu(tower, numeric, embeddings, events):
    logits = []
    for b in range(len(numeric)):
        x, emb, of, prices = row_of(numeric, embeddings, events, b)
        k, q = vectors(emb["v"], of["v"], prices)
        context = [tower.of_field(x[0] * tower.embed.numeric.weight[0]), tower.of_field(emb["v"][0])]
        target = tower.of_event(q)
        tokens = torch.stack([*context, *(tower.of_event(one) for one in k), target]) * math.sqrt(tower.width)
        n = len(tokens)
        position = [LENGTH + 1, LENGTH + 2, *range(len(k), 0, -1), 0]
        tokens = tokens + tower.position[position]
        for layer in tower.layers:
            tokens = hstu_layer(layer, tokens, 2, tower.longest)
        logits.append(tower.head(tower.norm(tokens[n - 1]) * tower.of_item(q)))
    return torch.cat(logits)


def hstu_layer(layer, x, prefix, divisor):
    u, v, q, k = layer.uvqk(layer.before(x)).split(layer.sizes, 1)
    u = F.silu(u)
    if not layer.is_dlrm:
        v, q, k = F.silu(v), F.silu(q), F.silu(k)
    out = []
    for i in range(len(x)):
        heads = []
        for h in range(layer.heads):
            qk, of_v = q.shape[1] // layer.heads, v.shape[1] // layer.heads
            seen = torch.zeros_like(v[0, :of_v])
            for j in range(len(x)):
                if j <= i or (i < prefix and j < prefix):
                    a = F.silu(layer.alpha * (q[i, h * qk : (h + 1) * qk] @ k[j, h * qk : (h + 1) * qk])) / divisor
                    seen = seen + a * v[j, h * of_v : (h + 1) * of_v]
            heads.append(seen)
        out.append(torch.cat(heads))
    av = torch.stack(out)
    y = u * layer.after(av)
    return x + layer.output(torch.cat([u, av, y], 1) if layer.is_dlrm else y)


def dien_unit(unit, x, h, a=1.0):
    u_x, r_x, n_x = unit.of_input(x).chunk(3)
    u_h, r_h, n_h = unit.of_state(h).chunk(3)
    u, r = torch.sigmoid(u_x + u_h), torch.sigmoid(r_x + r_h)
    return (1 - a * u) * h + a * u * torch.tanh(n_x + r * n_h)


def dien(tower, numeric, embeddings, events):
    logits = []
    for b in range(len(numeric)):
        x, emb, of, prices = row_of(numeric, embeddings, events, b)
        k, q = vectors(emb["v"], of["v"], prices)
        states = []
        for one in k:
            states.append(dien_unit(tower.extractor, one, states[-1] if states else torch.zeros_like(q)))
        score = [tower.score(torch.cat([q, h, q - h, q * h]))[0] for h in states]
        s = torch.zeros_like(q)
        for place, h in enumerate(states):
            s = dien_unit(tower.evolution, h, s, score[place].exp() / sum(one.exp() for one in score))
        logits.append(tower.mlp(torch.cat([flat(tower, x, emb["v"]), s])))
    return torch.cat(logits)


REFERENCE = {"bst": bst, "dien": dien, "din": din, "dare": dare, "hstu": hstu}
CASES = [
    ("bst", {}),
    ("bst", {"pooling": "target"}),
    ("dien", {}),
    ("din", {}),
    ("din", {"softmax": True}),
    ("dare", {}),
    ("dare", {"top_k": 2}),
    ("hstu", {}),
]


@pytest.mark.parametrize(
    ("model", "changes"), [*CASES, ("hstu", {"form": "research", "layers": 1, "token_norm": True})]
)
def test_logits_and_gradients_are_those_of_the_formulas(model, changes):
    tower = tower_of(model, **changes)
    given = inputs(tower)
    logits, expected = tower(*given), REFERENCE[model](tower, *given)
    torch.testing.assert_close(logits, expected)
    of = [*leaves(*given), *tower.parameters()]
    found, wanted = (torch.autograd.grad((one * torch.arange(1.0, 6)).sum(), of) for one in (logits, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("model", REFERENCE)
def test_a_row_does_not_depend_on_the_others_nor_on_their_padding(model):
    tower = tower_of(model).eval()
    whole = inputs(tower)
    logits = tower(*whole)
    for b, length in enumerate(LENGTHS):
        numeric, emb, of, prices = row_of(*whole, b)
        alone = Events(torch.tensor([0, length]), of, {"prices": prices})
        one = tower(numeric[None], {group: rows[None] for group, rows in emb.items()}, {"h": alone})
        torch.testing.assert_close(one[0], logits[b])
    nothing = inputs(tower, (0, 0))
    assert torch.isfinite(tower(*nothing)).all()
    torch.autograd.grad(tower(*nothing).sum(), [*tower.parameters()], allow_unused=True)
    none = inputs(tower, ())
    assert tower.train()(*none).shape == (0,) if model != "din" else True


@pytest.mark.parametrize("model", ["din", "dare"])
def test_the_order_of_events_does_not_matter(model):
    tower = tower_of(model).eval()
    numeric, embeddings, events = inputs(tower)
    order = torch.cat([a + torch.randperm(n) for a, n in zip(events["h"].offsets.tolist(), LENGTHS, strict=False)])
    of = {g: {name: rows[order] for name, rows in found.items()} for g, found in events["h"].embeddings.items()}
    turned = Events(events["h"].offsets, of, {"prices": events["h"].numbers["prices"][order]})
    torch.testing.assert_close(tower(numeric, embeddings, {"h": turned}), tower(numeric, embeddings, events))


def test_a_layer_of_bst_is_torchs_transformer_layer():
    layer = tower_of("bst").layers[0].eval()
    theirs = torch.nn.TransformerEncoderLayer(6, 2, 5, 0.0, F.leaky_relu, batch_first=True, dtype=torch.float64).train()
    same = {"self_attn.out_proj.": layer.output, "linear1.": layer.first}
    same |= {"linear2.": layer.second, "norm1.": layer.of_attention, "norm2.": layer.of_feed_forward}
    of_qkv = {"self_attn.in_proj_weight": layer.qkv.weight, "self_attn.in_proj_bias": torch.zeros(18)}
    same = {f"{a}{b}": getattr(module, b) for a, module in same.items() for b in ("weight", "bias")}
    theirs.load_state_dict(of_qkv | same)
    x, there = torch.randn(3, 4, 6, dtype=torch.float64), torch.arange(4) < torch.tensor([[4], [1], [3]])
    torch.testing.assert_close(layer(x, there)[there], theirs(x, src_key_padding_mask=~there)[there])


OTHERS = replace(GROUP, ids=("items", "ages", "others"), targets=(*GROUP.targets, None))


def test_dien_learns_to_tell_the_next_event_from_another():
    """The loss by hand, of rows with none, one and more events; not in evaluation, where negatives change nothing."""
    torch.manual_seed(1)
    config = dict(load_config(["model=dien"], "").model) | SMALL["dien"]
    config |= {"negatives": {"items": "others"}, "auxiliary": 0.7}
    fields = replace(FIELDS, sequences=(OTHERS,))
    tower = instantiate(config, "model", fields).double()
    numeric, embeddings, events = inputs(tower)
    others = torch.randn_like(events["h"].embeddings["v"]["items"]).requires_grad_()
    events["h"].embeddings["v"]["others"] = others
    tower(numeric, embeddings, events)
    expected = []
    for b in range(len(numeric)):
        _, emb, of, prices = row_of(numeric, embeddings, events, b)
        k, q = vectors(emb["v"], of["v"], prices)
        n, _ = vectors(emb["v"], {"items": of["v"]["others"], "ages": of["v"]["ages"]}, prices)
        h, row = torch.zeros_like(q), []
        for place in range(len(k) - 1):
            h = dien_unit(tower.extractor, k[place], h)
            yes, no = (torch.sigmoid(tower.next_event(torch.cat([h, one[place + 1]]))) for one in (k, n))
            row.append(-(yes.log() + (1 - no).log())[0])
        expected.append(0.7 * torch.stack(row).mean() if row else torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(tower.extra_loss, torch.stack(expected))
    assert torch.autograd.grad(tower.extra_loss.sum(), others)[0].abs().sum() > 0
    tower.extra_loss = None
    found = tower.eval()(numeric, embeddings, events)
    others.data.zero_()
    assert tower.extra_loss is None and torch.equal(found, tower(numeric, embeddings, events))


def test_din_whose_weights_are_one_sums_its_events():
    tower = tower_of("din")
    with torch.no_grad():
        tower.attention[0].score[-1].weight.zero_()
        tower.attention[0].score[-1].bias.fill_(1.0)
    numeric, embeddings, events = inputs(tower)
    k = tower.attention[0].vectors.events(events["h"])
    expected = torch.stack([part.sum(0) for part in k.split(LENGTHS)])
    torch.testing.assert_close(tower.attention[0](embeddings["v"], events["h"]), expected)


def test_dare_is_scaled_dot_product_attention_and_drops_by_score():
    tower = tower_of("dare", attention_dim=3)
    _, embeddings, events = inputs(tower)
    weights = tower._weights(embeddings["a"], events["h"])
    of = events["h"].embeddings["a"]
    for b, (first, length) in enumerate(zip(events["h"].offsets.tolist(), LENGTHS, strict=False)):
        here = slice(first, first + length)
        q = torch.cat([embeddings["a"][b, 1], tower.wanted[0]])[None]
        k = torch.cat([of["items"][here], of["ages"][here]], 1)
        value = torch.eye(length, dtype=torch.float64)
        expected = F.scaled_dot_product_attention(q[None], k[None], value[None], scale=3**-0.5)
        torch.testing.assert_close(weights[here], expected[0, 0])
    tower.top_k = 2
    weights = tower._weights(embeddings["a"], events["h"])
    assert [int((part > 0).sum()) for part in weights.split(LENGTHS)] == [min(2, n) for n in LENGTHS]
    grads = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), [of["items"]])[0]
    assert torch.equal(grads.abs().sum(1) > 0, (weights > 0) & (weights < 1))


@pytest.mark.parametrize("changes", [{}, {"form": "research", "layers": 1, "token_norm": True}])
def test_candidates_of_a_row_have_the_logits_that_they_have_alone(changes):
    """History and context are computed once; a candidate more changes nothing of the others, nor does the number."""
    tower = tower_of("hstu", **changes).eval()
    numeric, embeddings, events = inputs(tower)
    candidates = torch.randn(5, 4, *embeddings["v"].shape[1:], dtype=torch.float64)
    found = tower.of_candidates(numeric, embeddings, events, candidates)
    for number in range(4):
        own = {"v": torch.stack([embeddings["v"][:, 0], candidates[:, number, 1]], 1)}  # the user stays
        torch.testing.assert_close(found[:, number], tower(numeric, own, events))
    torch.testing.assert_close(tower.of_candidates(numeric, embeddings, events, candidates[:, 1:3]), found[:, 1:3])
    tokens = []
    tower.layers[0].register_forward_pre_hook(lambda _, given: tokens.append(len(given[0])))
    tower.of_candidates(numeric, embeddings, events, candidates)
    assert tokens == [sum(LENGTHS) + 5 * (2 + 4)]


def test_dice_normalises_over_all_events_and_by_running_statistics_in_evaluation():
    torch.manual_seed(0)
    dice, s = Dice(3), torch.randn(50, 3)
    dice.alpha.data.fill_(0.25)
    p = torch.sigmoid((s - s.mean(0)) / torch.sqrt(s.var(0, unbiased=False) + 1e-8))
    torch.testing.assert_close(dice(s), p * s + (1 - p) * 0.25 * s)
    kept = torch.sigmoid((s - 0.1 * s.mean(0)) / torch.sqrt(0.9 + 0.1 * s.var(0)))
    torch.testing.assert_close(dice.eval()(s), kept * s + (1 - kept) * 0.25 * s)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_sums_and_means_of_events(kind):
    values, offsets = torch.randn(sum(LENGTHS), 3, dtype=kind), torch.tensor([0, *LENGTHS]).cumsum(0)
    parts = values.split(LENGTHS)
    torch.testing.assert_close(sum_of_events(values, offsets), torch.stack([part.sum(0) for part in parts]))
    means = torch.stack([part.sum(0) / max(1, len(part)) for part in parts])
    torch.testing.assert_close(mean_of_events(values, offsets), means)


@pytest.mark.parametrize(
    ("model", "changes", "sequences", "line"),
    [
        ("din", {}, (), "no feature is a sequence with pooling: none"),
        ("dare", {}, (), "the schema has none; give its features pooling: none"),
        ("hstu", {}, (GROUP, GROUP), r"the schema has 2 \(h, h, ..\)"),
        ("din", {}, (SequenceGroup("h", ("items",), (), (None,), 3),), "no field has the table of a sequence of 'h'"),
        ("bst", {"heads": 4}, (GROUP,), "model.heads is 4; expected a divisor of model.width, 6"),
        ("bst", {"pooling": "mean"}, (GROUP,), "model.pooling is 'mean'; expected concat or target"),
        ("dien", {"negatives": {"item": "ages"}}, (GROUP,), "negatives names 'item', .* of 'h'; did you mean 'items'"),
        ("dien", {"negatives": {"items": "items"}}, (GROUP,), "model.negatives: 'items' stands for 'items' and else"),
        ("dien", {"negatives": ["items"]}, (GROUP,), r"model.negatives is \['items'\]; expected sequences by name"),
        ("dien", {"auxiliary": -1}, (GROUP,), "model.auxiliary is -1; expected 0 or more"),
        ("dare", {"top_k": 0}, (GROUP,), "model.top_k is 0"),
        ("hstu", {"form": "other"}, (GROUP,), "model.form is 'other'; expected one of dlrm, research"),
        ("hstu", {"heads": 0}, (GROUP,), "model.heads is 0"),
    ],
)
def test_models_that_cannot_be_are_refused(model, changes, sequences, line):
    config = dict(load_config([f"model={model}"], "").model) | SMALL[model] | changes
    with pytest.raises(ConfigError, match=line):
        instantiate(config, "model", Fields((), ("user", "item"), ScaledVectors, sequences=sequences))


def test_the_search_of_dare_takes_the_newest_of_equal_events_whatever_the_length_of_the_rectangle():
    scores = torch.tensor([[3.0, 1, 3, 3, 2], [5.0, 4, 3, 2, 1], [0.0, 0, 0, 0, 0]])
    expected = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    assert torch.equal(best(scores, 2), expected)
    longer = torch.cat([torch.full((3, 40), -9.0), scores], 1)
    assert torch.equal(best(longer, 2)[:, 40:], expected) and best(scores, 5).all()
