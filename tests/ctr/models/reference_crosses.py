"""More models once more, slowly, as in `reference.py`: those added later, most of which cross whole fields."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ctr.models.reference import (
    BY_CLASS,
    dot,
    first_order,
    mlp,
    numeric_vectors,
    ordered_pairs,
    side_by_side,
    vectors,
)


def normed(norm, a: Tensor) -> Tensor:
    """Batch norm over rows, and over what follows the channels; the rows themselves without a norm."""
    if isinstance(norm, torch.nn.Identity):
        return a
    over = [0, *range(2, a.dim())]
    mean = a.mean(over, keepdim=True)
    variance = ((a - mean) ** 2).mean(over, keepdim=True)
    shape = (1, -1, *[1] * (a.dim() - 2))
    return (a - mean) / torch.sqrt(variance + norm.eps) * norm.weight.view(shape) + norm.bias.view(shape)


def sigmoid(a: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-a))


def flat_of(t, x, emb) -> Tensor:
    return side_by_side(t.embed, x, vectors(t.embed, x, emb["v"]))


def rank_one(layer, x0: Tensor, xl: Tensor) -> Tensor:
    return x0 * dot(xl, layer.weight.weight)[:, None] + layer.bias + xl


def dcn(t, x, emb):
    xl = x0 = flat_of(t, x, emb)
    for layer in t.cross:
        xl = rank_one(layer, x0, xl)
    last = xl if t.mlp is None else torch.cat([xl, mlp(t.mlp, x0)], 1)
    return last @ t.output.weight[0] + t.output.bias


def gdcn(t, x, emb):
    xl = x0 = flat_of(t, x, emb)
    for layer in t.cross:
        gate = sigmoid(xl @ layer.gate.weight.t())
        xl = x0 * (xl @ layer.weight.weight.t() + layer.weight.bias) * gate + xl
    last = torch.cat([xl, mlp(t.mlp, x0)], 1) if t.parallel else mlp(t.mlp, xl)
    return last @ t.output.weight[0] + t.output.bias


def optinter(t, x, emb):
    """Without crosses: half of each pair is its product, half nothing."""
    e = vectors(t.embed, x, emb["v"])
    s = vectors(t.embed_pairs, x, emb["s"]) if "s" in emb else e
    p = torch.exp(t.alpha[:, 1]) / (torch.exp(t.alpha[:, 1]) + torch.exp(t.alpha[:, 2]))
    pairs = [p[number] * s[i] * s[j] for number, (i, j) in enumerate(ordered_pairs(s))]
    return mlp(t.mlp, torch.cat([side_by_side(t.embed, x, e), *pairs], 1))[:, 0]


def fwfm(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    logit = t.pairs.bias
    for number, (i, j) in enumerate(ordered_pairs(e)):
        logit = logit + t.pairs.weight[0, number] * dot(e[i], e[j])
    if t.part == "FiLV":
        return logit + dot(side_by_side(t.embed, x, e), t.of_fields.weight)
    if t.part == "LW":
        return logit + first_order(t.first_order, x, emb["w"])
    for one, weight in zip(e, vectors(t.of_features, x, emb["u"]), strict=True):
        logit = logit + dot(one, weight)
    return logit if t.of_numbers is None else logit + dot(x, t.of_numbers.weight)


def fmfm(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    logit = first_order(t.first_order, x, emb["w"])
    for number, (i, j) in enumerate(ordered_pairs(e)):
        kernel = t.products.kernel[number]
        matrix = kernel if t.products.kernel_type == "mat" else torch.diag(kernel[:, 0])
        logit = logit + dot(e[i] @ matrix, e[j])
    return logit


def edcn(t, x, emb):
    b = flat_of(t, x, emb)
    c0 = None
    for regulate, cross, deep, number in zip(t.regulate, t.cross, t.deep, range(99), strict=False):
        regulated = []
        for scores, norm in zip(regulate.scores, regulate.norms, strict=True):
            exp = torch.exp(scores / regulate.temperature)
            gates = exp / exp.sum()
            numbers = x.shape[1] if t.embed.raw else 0
            wide = [gates[f].expand(t.embed.dim) for f in range(t.embed.count)]
            wide += [gates[t.embed.count + n][None] for n in range(numbers)]
            regulated.append(normed(norm, b * torch.cat(wide)))
        c, d = regulated
        c0 = c if c0 is None else c0
        c = rank_one(cross, c0, c)
        d = (d @ deep.weight.t() + deep.bias).clamp(min=0)
        if t.bridge == "product":
            b = c * d
        elif t.bridge == "sum":
            b = c + d
        else:
            b = (torch.cat([c, d], 1) @ t.join[number].weight.t() + t.join[number].bias).clamp(min=0)
    return torch.cat([c, d, b], 1) @ t.output.weight[0] + t.output.bias


def dlrm(t, x, emb):
    v = [emb["v"][:, i] for i in range(emb["v"].shape[1])]
    parts = []
    if t.bottom is not None:
        numbers = x if t.numeric is None else torch.cat(numeric_vectors(t.numeric, x), 1)
        z = mlp(t.bottom, numbers).clamp(min=0)
        v, parts = [z, *v], [z]
    parts += [dot(v[i], v[j])[:, None] for i, j in ordered_pairs(v)]
    return mlp(t.mlp, torch.cat(parts, 1))[:, 0]


def layer_normed(a: Tensor, scale=1.0, shift=0.0) -> Tensor:
    mean = a.mean(-1, keepdim=True)
    return (a - mean) / torch.sqrt(((a - mean) ** 2).mean(-1, keepdim=True) + 1e-5) * scale + shift


def mask_net(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    flat, state = side_by_side(t.embed, x, e), e
    if not isinstance(t.norm, torch.nn.Identity):
        state = [layer_normed(a, t.norm.scale[f], t.norm.shift[f]) for f, a in enumerate(e)]
    state = side_by_side(t.embed, x, state)
    outputs = []
    for block in t.blocks:
        a = (mlp(block.mask, flat) * state) @ block.weight.weight.t()
        if not isinstance(block.norm, torch.nn.Identity):
            a = layer_normed(a, block.norm.weight, block.norm.bias)
        outputs.append(a.clamp(min=0))
        state = outputs[-1] if t.serial else state
    return mlp(t.mlp, state if t.serial else torch.cat(outputs, 1))[:, 0]


def wukong(t, x, emb):
    state = vectors(t.embed, x, emb["v"])
    for layer in t.layers:
        n, rank = layer.project.shape
        products = [
            sum(dot(state[i], state[j]) * layer.project[j, k] for j in range(n))[:, None]
            for i in range(n)
            for k in range(rank)
        ]
        a = layer_normed(torch.cat(products, 1), layer.fm_norm.weight, layer.fm_norm.bias)
        made = list(mlp(layer.fm_mlp, a).clamp(min=0).split(layer.dim, 1))
        if layer.compress is not None:
            made += [sum(w * one for w, one in zip(row, state, strict=True)) for row in layer.compress.weight]
        if isinstance(layer.residual, torch.nn.Identity):
            rest = state
        else:
            rest = [
                sum(w * one for w, one in zip(row, state, strict=True)) + bias
                for row, bias in zip(layer.residual.weight, layer.residual.bias, strict=True)
            ]
        norm = layer.norm
        state = [layer_normed(a + b, norm.weight, norm.bias) for a, b in zip(made, rest, strict=True)]
    return mlp(t.mlp, side_by_side(t.embed, x, state))[:, 0]


def fibinet(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    weights = mlp(t.weigh, torch.stack([a.mean(1) for a in e], 1))
    weighed = [a * weights[:, f : f + 1] for f, a in enumerate(e)]
    parts = []
    for products, fields in ((t.plain, e), (t.weighed, weighed)):
        for number, (i, j) in enumerate(ordered_pairs(fields)):
            matrix = products.weight[{"all": 0, "each": i, "interaction": number}[products.kind]]
            parts.append((fields[i] @ matrix) * fields[j])
    return first_order(t.first_order, x, emb["w"]) + mlp(t.mlp, side_by_side(t.embed, x, parts))[:, 0]


def afn(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    logs = normed(t.log_norm, torch.stack([torch.log(torch.clamp(torch.abs(a), min=1e-5)) for a in e], 1))
    products = [torch.exp(sum(order * logs[:, i] for i, order in enumerate(orders))) for orders in t.orders.weight]
    products = normed(t.exp_norm, torch.stack(products, 1))
    logit = mlp(t.mlp, side_by_side(t.embed, x, list(products.unbind(1))))
    if not t.is_plus:
        return logit[:, 0]
    deep = mlp(t.deep, side_by_side(t.embed, x, vectors(t.deep_embed, x, emb["deep"])))
    return logit[:, 0] * t.join.weight[0, 0] + deep[:, 0] * t.join.weight[0, 1] + t.join.bias


def rank_mixer(t, x, emb):
    flat = flat_of(t, x, emb)
    state = []
    for token in range(t.tokens):
        part = flat[:, token * t.part : (token + 1) * t.part]
        state.append(part @ t.tokenise.weight[token, : part.shape[1]] + t.tokenise.bias[token, 0])
    for layer in t.layers:
        size = state[0].shape[1] // t.tokens
        mixed = [torch.cat([one[:, head * size : (head + 1) * size] for one in state], 1) for head in range(t.tokens)]
        norm = layer.mix_norm
        s = [layer_normed(a + b, norm.weight, norm.bias) for a, b in zip(mixed, state, strict=True)]
        state = []
        for token, one in enumerate(s):
            wide = one @ layer.widen.weight[token] + layer.widen.bias[token]
            wide = wide * 0.5 * (1 + torch.erf(wide / 2**0.5))
            narrow = wide @ layer.narrow.weight[token] + layer.narrow.bias[token]
            state.append(layer_normed(narrow + one, layer.norm.weight, layer.norm.bias))
    return mlp(t.mlp, sum(state) / t.tokens)[:, 0]


def heads_of(t, x, emb) -> list[Tensor]:
    e, dim = vectors(t.embed, x, emb["v"]), t.embed.dim // t.heads
    heads, cut = [], (dim + 1) // 2
    for head in range(t.heads):
        own = [one[:, head * dim : (head + 1) * dim] for one in e]
        halves = [one[:, :cut] for one in own] + [one[:, cut:] for one in own]
        heads.append(torch.cat(halves + ([x] if t.embed.raw else []), 1))
    return heads


def cross_stack(stack, first: list[Tensor]) -> list[Tensor]:
    state = first
    for layer in stack.layers:
        half = [one @ layer.weight.weight.t() for one in state]
        half = list(normed(layer.batch_norm, torch.stack(half, 1)).unbind(1))
        after = []
        for h, one, x1 in zip(half, state, first, strict=True):
            norm = layer.layer_norm
            mask = h if isinstance(norm, torch.nn.Identity) else layer_normed(h, norm.weight, norm.bias)
            c = torch.cat([h, h * mask.clamp(min=0)], 1)[:, : one.shape[1]]
            after.append((one if stack.doubles else x1) * (c + layer.bias) + one)
        state = after
    return state


def over_heads(output, heads: list[Tensor]) -> Tensor:
    return sum(dot(one, output.weight) + output.bias for one in heads) / len(heads)


def ecn(t, x, emb):
    return over_heads(t.output, cross_stack(t.cross, heads_of(t, x, emb)))


def fcn(t, x, emb):
    first = heads_of(t, x, emb)
    deep = over_heads(t.deep_output, cross_stack(t.deep, first))
    return (deep + over_heads(t.shallow_output, cross_stack(t.shallow, first))) / 2


def final_net(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    wide = e
    if t.gate is not None:
        weight, bias = t.gate.weight, t.gate.bias
        gates = [sum(weight[i, j] * e[j] for j in range(len(e))) + bias[i] for i in range(len(e))]
        wide = e + [one * gate for one, gate in zip(e, gates, strict=True)]
    logits = []
    for stack, output, fields in ((t.first, t.first_output, wide), (t.second, t.second_output, e)):
        if stack is None:
            continue
        a = side_by_side(t.embed, x, fields)
        for layer in stack:
            kind = type(layer).__name__
            if kind == "FactorizedInteraction":
                a = a @ layer.weight.weight.t() + layer.weight.bias
                h2, h1 = a[:, : a.shape[1] // 2], a[:, a.shape[1] // 2 :]
                a = torch.cat([h2, h1 * h2], 1) if layer.concat else h2 + h1 * h2
            elif kind == "BatchNorm":
                a = normed(layer, a)
            elif kind == "ReLU":
                a = a.clamp(min=0)
        logits.append(dot(a, output.weight) + output.bias)
    return sum(logits) / len(logits)


# In place, so that FGCNN's slow version finds them, too.
BY_CLASS |= {
    "DCN": dcn,
    "GDCN": gdcn,
    "FwFM": fwfm,
    "OptInter": optinter,
    "FmFM": fmfm,
    "EDCN": edcn,
    "DLRM": dlrm,
    "MaskNet": mask_net,
    "Wukong": wukong,
    "FiBiNET": fibinet,
    "AFN": afn,
    "RankMixer": rank_mixer,
    "ECN": ecn,
    "FCN": fcn,
    "FinalNet": final_net,
}
