"""Models over several labels once more, slowly, as `reference.py`: row by row of the formulas, logits [B, T]."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ctr.models.reference import BY_CLASS, scaled


def net(mlp, x: Tensor, *, last: bool) -> Tensor:
    """An MLP without norm: its linear layers with max(0, .) between them; last: the last one is linear."""
    layers = [one for one in mlp if isinstance(one, torch.nn.Linear)]
    for number, layer in enumerate(layers):
        x = x @ layer.weight.T + layer.bias
        if not (last and number == len(layers) - 1):
            x = torch.where(x > 0, x, 0.0)
    return x


def flat(embed, x: Tensor, v: Tensor) -> Tensor:
    parts = scaled(embed.numeric, x) if embed.numeric is not None else []
    return torch.cat(parts + [v[:, i] for i in range(v.shape[1])], 1)


def shares(gate, x: Tensor) -> Tensor:
    e = net(gate.mlp, x, last=True).exp()
    return e / e.sum(1, keepdim=True)


def expert_outputs(experts, x: Tensor, embeddings: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    v = embeddings["v"]
    if experts.towers:
        outputs = [torch.stack(body(t, x, embeddings), 1) for t in experts.nets]
        return outputs, x if experts.embed is None else flat(experts.embed, x, v)
    inputs = flat(experts.embed, x, v)
    return [net(one, inputs, last=True) for one in experts.nets], inputs


def body(tower, x: Tensor, embeddings: dict[str, Tensor]) -> list[Tensor]:
    """A DNN of several outputs."""
    assert type(tower).__name__ == "DNN"
    inputs = flat(tower.embed, x, embeddings["v"])
    return list(net(tower.mlp, inputs, last=True).unbind(1))


def heads(t, states: list[Tensor]) -> Tensor:
    return torch.stack([net(head, state, last=True)[:, 0] for head, state in zip(t.nets, states, strict=True)], 1)


def shared_bottom(t, x: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    (state,), _ = expert_outputs(t.bottom, x, embeddings)
    return heads(t.heads, [state] * len(t.heads.nets))


def mmoe(t, x: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    outputs, inputs = expert_outputs(t.experts, x, embeddings)
    mixed = []
    for gate in t.gate:
        share = shares(gate, inputs)
        mixed.append(sum(share[:, k : k + 1] * one for k, one in enumerate(outputs)))
    return heads(t.heads, mixed)


def ple(t, x: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    inputs = flat(t.embed, x, embeddings["v"])
    states, common = [inputs] * len(t.heads.nets), inputs
    for layer in t.extraction:
        shared = [net(one, common, last=True) for one in layer.shared]
        own = [[net(one, state, last=True) for one in nets] for nets, state in zip(layer.own, states, strict=True)]
        following = []
        for gate, state, mine in zip(layer.gates, states, own, strict=True):
            share = shares(gate, state)
            following.append(sum(share[:, k : k + 1] * one for k, one in enumerate([*mine, *shared])))
        if layer.shared_gate is not None:
            every = [one for mine in own for one in mine] if layer.mixes_all else []
            share = shares(layer.shared_gate, common)
            common = sum(share[:, k : k + 1] * one for k, one in enumerate([*every, *shared]))
        states = following
    return heads(t.heads, states)


def esmm(t, x: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    inputs = flat(t.embed, x, embeddings["v"])
    return torch.stack([net(one, inputs, last=True)[:, 0] for one in t.nets], 1)


def dbmtl(t, x: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    (state,), _ = expert_outputs(t.bottom, x, embeddings)
    related: list[Tensor] = []
    logits = []
    for head, relation, output in zip(t.heads, t.relations, t.outputs, strict=True):
        own = net(head, state, last=False)
        related.append(net(relation, torch.cat([own, *related], 1), last=False))
        logits.append((related[-1] @ output.weight.T + output.bias)[:, 0])
    return torch.stack(logits, 1)


def gnolr(t, x: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    """The logits of q_i / q_(i-1), of the probabilities themselves."""
    sides = []
    for side in t.sides:
        v = embeddings["v"][:, side.ids.tolist()]
        sides.append(flat(side.embed, x[:, side.numeric.tolist()], v))
    z, before, logits = 0.0, 1.0, []
    for i, a in enumerate(t.offsets):
        u, w = (net(nets[i], inputs, last=True) for nets, inputs in zip(t.nets, sides, strict=True))
        cosine = (u * w).sum(1) / (u.square().sum(1).sqrt() * w.square().sum(1).sqrt())
        z = z + t.slopes[i] * cosine
        q = 1 / (1 + torch.exp(a - z))
        c = q / before
        logits.append(torch.log(c / (1 - c)))
        before = q
    return torch.stack(logits, 1)


OVER_LABELS = {
    "SharedBottom": shared_bottom,
    "MMoE": mmoe,
    "PLE": ple,
    "ESMM": esmm,
    "DBMTL": dbmtl,
    "GNOLR": gnolr,
}
assert not set(OVER_LABELS) & set(BY_CLASS)
