"""Every model once more, slowly: loops over fields and pairs that follow the papers' formulas symbol by symbol.

Each function takes the tower (only its parameters are read), the numeric values [B, n] and the embeddings by group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tessera.ctr.models.batch_norm import BatchNorm


def scaled(module, x: Tensor) -> list[Tensor]:
    return [x[:, i : i + 1] * module.weight[i] for i in range(x.shape[1])]


def autodis(module, x: Tensor) -> list[Tensor]:
    out = []
    for j in range(x.shape[1]):
        h = x[:, j : j + 1] * module.first[j]
        h = torch.where(h > 0, h, module.slope * h)
        score = h @ module.second[j] + module.skip * h
        exp = torch.exp((score - score.max(1, keepdim=True).values) / module.temperature)
        p = exp / exp.sum(1, keepdim=True)
        out.append(sum(p[:, k : k + 1] * module.meta[j, k] for k in range(p.shape[1])))
    return out


def bucketised(module, x: Tensor) -> list[Tensor]:
    width = (module.high - module.low) / module.buckets
    out = []
    for j in range(x.shape[1]):
        rows = []
        for value in x[:, j].tolist():
            bucket = min(max(math.floor((value - module.low) / width), 0), module.buckets - 1)
            rows.append(module.weight[j * module.buckets + bucket])
        out.append(torch.stack(rows))
    return out


NUMERIC = {"ScaledVectors": scaled, "AutoDis": autodis, "Bucketised": bucketised}


def numeric_vectors(module, x: Tensor) -> list[Tensor]:
    kind = type(module).__name__
    return NUMERIC[kind](module, x) if kind in NUMERIC else []


def vectors(embed, x: Tensor, emb: Tensor) -> list[Tensor]:
    """e_1 .. e_F, numeric fields first."""
    return numeric_vectors(embed.numeric, x) + [emb[:, i] for i in range(emb.shape[1])]


def side_by_side(embed, x: Tensor, e: list[Tensor]) -> Tensor:
    return torch.cat(e + ([x] if embed.raw else []), 1)


def first_order(module, x: Tensor, w: Tensor) -> Tensor:
    terms = numeric_vectors(module.numeric, x) + [w[:, i] for i in range(w.shape[1])]
    return module.bias + sum(term[:, 0] for term in terms)


def mlp(layers, a: Tensor) -> Tensor:
    for layer in layers:
        kind = type(layer).__name__
        if kind == "Linear":
            a = torch.stack([(a * row).sum(1) for row in layer.weight], 1)
            a = a if layer.bias is None else a + layer.bias
        elif kind == "ReLU":
            a = torch.where(a > 0, a, torch.zeros_like(a))
        elif kind == "BatchNorm":
            mean, variance = a.mean(0), ((a - a.mean(0)) ** 2).mean(0)
            a = (a - mean) / torch.sqrt(variance + layer.eps) * layer.weight + layer.bias
        else:
            raise AssertionError(kind)
    return a


def ordered_pairs(e: list[Tensor]):
    for i in range(len(e)):
        for j in range(i + 1, len(e)):
            yield i, j


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def fm_pairs(e: list[Tensor]) -> Tensor:
    return sum(dot(e[i], e[j]) for i, j in ordered_pairs(e))


def lr(t, x, emb):
    return first_order(t.first_order, x, emb["w"])


def fm(t, x, emb):
    return first_order(t.first_order, x, emb["w"]) + fm_pairs(vectors(t.embed, x, emb["v"]))


def dnn(t, x, emb):
    return mlp(t.mlp, side_by_side(t.embed, x, vectors(t.embed, x, emb["v"])))[:, 0]


def wide_deep(t, x, emb):
    return first_order(t.wide, x, emb["w"]) + dnn(t, x, emb)


def deepfm(t, x, emb):
    return fm(t, x, emb) + dnn(t, x, emb)


def _product_net(t, x, e, products):
    return mlp(t.mlp, torch.cat([side_by_side(t.embed, x, e), *products], 1))[:, 0]


def ipnn(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    return _product_net(t, x, e, [dot(e[i], e[j])[:, None] for i, j in ordered_pairs(e)])


def deepfm_p(t, x, emb):
    return fm(t, x, emb) + ipnn(t, x, emb)


def opnn(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    total = 0
    for a in e:
        for b in e:  # f f^T with f = sum_i e_i is the sum of all outer products
            total = total + torch.stack([a[:, k : k + 1] * b for k in range(a.shape[1])], 1)
    return _product_net(t, x, e, [total.flatten(1)])


def kpnn(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    products = []
    for number, (i, j) in enumerate(ordered_pairs(e)):
        kernel = t.products.kernel[number]
        if t.products.kernel_type == "mat":
            product = dot(e[i] @ kernel, e[j])
        elif t.products.kernel_type == "vec":
            product = (e[i] * kernel.flatten() * e[j]).sum(1)
        else:
            product = kernel * dot(e[i], e[j])
        products.append(product[:, None])
    return _product_net(t, x, e, products)


def pin(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    state = [torch.cat([e[i], e[j], e[i] * e[j]], 1) for i, j in ordered_pairs(e)]
    for number, (weight, bias, norm) in enumerate(
        zip(t.subnets.weights, t.subnets.biases, t.subnets.norms, strict=True)
    ):
        if number:
            state = [s.clamp(min=0) for s in state]
        state = [s @ weight[p] + bias[p] for p, s in enumerate(state)]
        together = torch.cat(state, 1)  # all pairs and units of a row
        mean = together.mean(1, keepdim=True)
        deviation = torch.sqrt(((together - mean) ** 2).mean(1, keepdim=True) + 1e-5)
        state = [(s - mean) / deviation * norm.scale + norm.shift for s in state]
    return mlp(t.mlp, torch.cat(state + ([x] if t.embed.raw else []), 1))[:, 0]


def autoint(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    state = e
    for layer in t.interact:
        state = _interacting(layer, state)
    logit = torch.cat(state + ([x] if t.embed.raw else []), 1) @ t.output.weight[0] + t.output.bias
    logit = logit if t.first_order is None else logit + first_order(t.first_order, x, emb["w"])
    return logit if t.mlp is None else logit + dnn(t, x, emb)


def _interacting(layer, e: list[Tensor]) -> list[Tensor]:
    matrices = layer.project.weight.split(layer.width)
    biases = layer.project.bias.split(layer.width) if layer.code else [0.0] * len(matrices)
    q, k, v, *residual = (
        [(a @ m.t() + b).clamp(min=0) if layer.code else a @ m.t() for a in e]
        for m, b in zip(matrices, biases, strict=True)
    )
    size = layer.width // layer.heads
    out = []
    for m in range(len(e)):
        heads = []
        for h in range(layer.heads):
            cut = slice(h * size, (h + 1) * size)
            scaled = layer.scale != 1 or size == 1
            psi = [dot(q[m][:, cut], k[n][:, cut]) / (math.sqrt(size) if scaled else 1) for n in range(len(e))]
            exp = [torch.exp(score) for score in psi]
            heads.append(sum(exp[n][:, None] / sum(exp)[:, None] * v[n][:, cut] for n in range(len(e))))
        total = torch.cat(heads, 1)
        rest = residual[0][m] if residual else e[m] if layer.keeps else 0.0
        if isinstance(layer.norm, torch.nn.Identity):
            out.append((total + rest).clamp(min=0))
        elif layer.norm_first:
            out.append(_layer_normed(layer.norm, total + rest, 1e-5).clamp(min=0))
        else:
            out.append(_layer_normed(layer.norm, (total + rest).clamp(min=0), 1e-8))
    return out


def _layer_normed(norm, a: Tensor, eps: float) -> Tensor:
    mean, variance = a.mean(1, keepdim=True), a.var(1, correction=0, keepdim=True)
    return (a - mean) / torch.sqrt(variance + eps) * norm.weight + norm.bias


def dcn_v2(t, x, emb):
    x0 = side_by_side(t.embed, x, vectors(t.embed, x, emb["v"]))
    xl = x0
    for layer in t.cross:
        if isinstance(layer, torch.nn.Linear):
            product = xl @ layer.weight.t() + layer.bias
        else:
            v, u = layer
            product = (xl @ v.weight.t()) @ u.weight.t() + u.bias
        xl = x0 * product + xl
    last = torch.cat([xl, mlp(t.mlp, x0)], 1) if t.parallel else mlp(t.mlp, xl)
    return last @ t.output.weight[0] + t.output.bias


def xdeepfm(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    before, pooled = e, []
    for layer in t.cin.layers:
        after = []
        for weights in layer.weight:
            w = weights.view(len(before), len(e))
            after.append(sum(w[i, j] * before[i] * e[j] for i in range(len(before)) for j in range(len(e))))
        before = after
        pooled += [a.sum(1) for a in after]
    cin = sum(w * p for w, p in zip(t.cin_output.weight[0], pooled, strict=True))
    return first_order(t.first_order, x, emb["w"]) + cin + dnn(t, x, emb)


def final_mlp(t, x, emb):
    e = vectors(t.embed, x, emb["v"])
    flat = side_by_side(t.embed, x, e)
    outputs = []
    for gate, stream in ((t.gate1, t.mlp1), (t.gate2, t.mlp2)):
        context = torch.cat([e[i] for i in gate.fields], 1) if gate.fields else gate.context
        outputs.append(mlp(stream, 2 / (1 + torch.exp(-mlp(gate.mlp, context))) * flat))
    a, b = outputs
    logit = a @ t.fusion.first.weight[0] + t.fusion.first.bias + b @ t.fusion.second.weight[0]
    for part_a, part_b, weight in zip(
        a.chunk(t.fusion.heads, 1), b.chunk(t.fusion.heads, 1), t.fusion.weight, strict=True
    ):
        logit = logit + dot(part_a @ weight, part_b)
    return logit


def fgcnn(t, x, emb):
    e = vectors(t.embed, x, emb["generation"])
    generation, dim = t.generate, t.embed.dim
    maps, new = [torch.stack(e, 1)], []  # one map [B, fields, D] per channel
    for conv, norm, recombine in zip(generation.convolutions, generation.norms, generation.recombinations, strict=True):
        biases = torch.zeros(len(conv.weight), dtype=conv.weight.dtype) if conv.bias is None else conv.bias
        maps = [_convolve(conv.weight[c, :, 0], biases[c], maps) for c in range(len(conv.weight))]
        if isinstance(norm, BatchNorm):
            maps = [
                (m - m.mean()) / torch.sqrt(m.var(correction=0) + norm.eps) * norm.weight[c] + norm.bias[c]
                for c, m in enumerate(maps)
            ]
        maps = [torch.tanh(m) for m in maps]
        maps = [_pooled(m, generation.pool, both=generation.pad_both) for m in maps]
        lying = torch.stack(
            [maps[c][:, h, d] for d in range(dim) for h in range(maps[0].shape[1]) for c in range(len(maps))], 1
        )
        fields = torch.tanh(lying @ recombine.weight.t() + recombine.bias)
        new += list(fields.split(dim, 1))
    raw = {name: value for name, value in emb.items() if name != "generation"}
    raw["v"] = torch.stack([raw["v"][:, i] for i in range(raw["v"].shape[1])] + new, 1)
    return BY_CLASS[type(t.classifier).__name__](t.classifier, x, raw)


def _pooled(m: Tensor, pool: int, *, both: bool) -> Tensor:
    """The maximum of each `pool` fields: from the first on, or after as many at both ends as are left over, of -1,
    which is below what tanh gives."""
    if not both:
        return torch.stack([part.max(1).values for part in m.split(pool, 1)], 1)
    pad = torch.full_like(m[:, : m.shape[1] % pool], -1.0)
    m = torch.cat([pad, m, pad], 1)
    return torch.stack([m[:, at : at + pool].max(1).values for at in range(0, m.shape[1] - pool + 1, pool)], 1)


def _convolve(weight: Tensor, bias: Tensor, maps: list[Tensor]) -> Tensor:
    """weight: [channels in, height]; over the fields only, zeros beyond the ends."""
    fields, height = maps[0].shape[1], weight.shape[1]
    rows = []
    for f in range(fields):
        total = bias
        for channel, image in enumerate(maps):
            for tap in range(height):
                source = f + tap - (height - 1) // 2
                if 0 <= source < fields:
                    total = total + weight[channel, tap] * image[:, source]
        rows.append(total if total.dim() > 1 else total.expand(maps[0][:, 0].shape))
    return torch.stack(rows, 1)


BY_CLASS = {
    "LR": lr,
    "FM": fm,
    "DNN": dnn,
    "WideDeep": wide_deep,
    "DeepFM": deepfm,
    "DeepFMP": deepfm_p,
    "IPNN": ipnn,
    "OPNN": opnn,
    "KPNN": kpnn,
    "PIN": pin,
    "AutoInt": autoint,
    "DCNV2": dcn_v2,
    "XDeepFM": xdeepfm,
    "FinalMLP": final_mlp,
    "FGCNN": fgcnn,
}
