"""Parts that models over several labels share: experts, gates that mix them, and one head per label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tessera.ctr.instantiate import instantiate
from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError


class Experts(nn.Module):
    """K nets on the same fields: MLPs on the flat embeddings, without an activation behind the last layer, or other
    models of the project (`body`) with as many outputs.

    Attributes:
        embedding_dims: what the experts and the flat input read.
        inputs: width of the flat input; width: of an expert's output.
    """

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        count: int,
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
        body: Mapping[str, Any] | None,
        is_gated: bool = False,
    ) -> None:
        """is_gated: somebody reads the flat input, too. If nobody does and experts are bodies, no numeric field is
        embedded here: data parallel refuses parameters that get no gradient."""
        super().__init__()
        check_count("model.experts", count)
        check_widths("the net", hidden)
        embedded = is_gated or body is None
        self.embed = FieldEmbedding(fields, embedding_dim, side_by_side=True) if embedded else None
        self.inputs, self.width = 0 if self.embed is None else self.embed.inputs, hidden[-1]
        self.embedding_dims = {"v": embedding_dim}
        self.towers = body is not None
        if body is None:
            made: list[nn.Module] = [
                perceptron(self.inputs, hidden, dropout, batch_norm=batch_norm) for _ in range(count)
            ]
        else:
            bodies = [body_of(body, fields, embedding_dim, hidden[-1]) for _ in range(count)]
            self.embedding_dims |= bodies[0].embedding_dims
            made = [*bodies]
        self.nets = nn.ModuleList(made)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the experts' outputs [B, K, width] and the flat input [B, inputs]."""
        flat = numeric_bn
        if self.embed is not None:
            flat = self.embed.flat(numeric_bn, self.embed(numeric_bn, embeddings["v"]))
        if self.towers:
            outputs = [net(numeric_bn, embeddings).reshape(-1, self.width) for net in self.nets]
        else:
            outputs = [net(flat) for net in self.nets]
        return torch.stack(outputs, 1), flat


class Gate(nn.Module):
    """softmax(MLP(x)): the share of each expert, [B, inputs] -> [B, K].

    Attributes:
        mean: the shares' mean over the last batch that was trained, float [K]; for the log.
    """

    mean: Tensor

    def __init__(self, inputs: int, hidden: Sequence[int], experts: int) -> None:
        super().__init__()
        self.mlp = MLP(inputs, hidden, outputs=experts)
        self.register_buffer("mean", torch.full((experts,), 1 / experts), persistent=False)

    def forward(self, x_bi: Tensor) -> Tensor:
        share_bk = torch.softmax(self.mlp(x_bi), 1)
        if self.training and not torch.compiler.is_compiling():
            self.mean = share_bk.detach().mean(0)
        return share_bk

    def mixed(self, x_bi: Tensor, experts_bkw: Tensor) -> Tensor:
        """Return the experts' outputs by their shares, [B, width]."""
        return torch.bmm(self(x_bi).to(experts_bkw.dtype).unsqueeze(1), experts_bkw).squeeze(1)


class Gates(nn.ModuleList):
    """Gates in a list whose type says so."""

    def __iter__(self) -> Iterator[Gate]:
        return cast(Iterator[Gate], super().__iter__())


class Heads(nn.Module):
    """One MLP per label, each on an input of its own: tensors [B, inputs] -> logits [B, T], or [B] of one label."""

    def __init__(self, labels: int, inputs: int, hidden: Sequence[int], dropout: float, *, batch_norm: bool) -> None:
        super().__init__()
        self.nets = nn.ModuleList(MLP(inputs, hidden, dropout, batch_norm=batch_norm) for _ in range(labels))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        return side_by_side([net(state) for net, state in zip(self.nets, states, strict=True)])


def side_by_side(logits: Sequence[Tensor]) -> Tensor:
    """Return logits [B, T] of T tensors [B, 1]; [B] of one."""
    return label_logits(torch.cat(list(logits), 1))


def perceptron(inputs: int, hidden: Sequence[int], dropout: float, *, batch_norm: bool) -> MLP:
    """Return an MLP whose last layer, of `hidden[-1]` units, is linear."""
    return MLP(inputs, hidden[:-1], dropout, batch_norm=batch_norm, outputs=hidden[-1])


def body_of(body: Mapping[str, Any], fields: Fields, embedding_dim: int, outputs: int) -> Tower:
    """Return a model of the project as a part of another one, with so many outputs.

    Raises ConfigError: it answers one logit alone, its parts have losses of their own, or its `embedding_dim` is
        another one.
    """
    tower = instantiate(body, "model.body", replace(fields, outputs=outputs), embedding_dim=embedding_dim)
    assert isinstance(tower, Tower)
    if not tower.has_heads:
        raise ConfigError(
            f"model.body.target is {body['target']}, which answers one logit and cannot be a part of another model; "
            "expected one such as tessera.ctr.models.dcn_v2.DCNV2"
        )
    if tower.branch_loss != "none":
        raise ConfigError(
            f"model.body.target is {body['target']}, whose parts have losses to the labels and which cannot be a part "
            "of another model; expected one such as tessera.ctr.models.dcn_v2.DCNV2"
        )
    return tower


def check_count(key: str, count: int, at_least: int = 1) -> None:
    """Raise ConfigError for too few experts."""
    if count < at_least:
        raise ConfigError(f"{key} is {count}; expected at least {at_least}")


def check_widths(key: str, hidden: Sequence[int]) -> None:
    """Raise ConfigError where a net has no layer."""
    if not hidden or min(hidden) < 1:
        raise ConfigError(f"{key} is {list(hidden)}; expected the widths of at least one layer")


def named_gates(fields: Fields, gates: Iterable[Gate], prefix: str = "") -> dict[str, Tensor]:
    """Return the mean shares of one gate per label, by the labels' names."""
    return {f"{prefix}{label.name}": gate.mean for label, gate in zip(fields.labels, gates, strict=True)}


def need_funnel(model: str, fields: Fields) -> None:
    """Raise ConfigError unless the labels are one chain, each in the space of the one before it."""
    labels = fields.labels
    parents = [label.parent for label in labels]
    if len(labels) < 2 or parents != [None, *range(len(labels) - 1)] or any(label.is_number for label in labels):
        names = ", ".join(label.name for label in labels)
        raise ConfigError(
            f"model.target is {model}, whose labels are a funnel, and data.schema.labels has {names}; expected labels "
            "of 0 and 1, each where the one before it is 1: [click, {name: buy, where: click}]"
        )
