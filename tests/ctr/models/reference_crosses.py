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


# In place, so that FGCNN's slow version finds them, too.
BY_CLASS |= {
    "DCN": dcn,
    "GDCN": gdcn,
    "FwFM": fwfm,
    "FmFM": fmfm,
    "EDCN": edcn,
    "DLRM": dlrm,
}
