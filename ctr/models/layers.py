"""Layers that several towers share, under the names the literature gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tessera.ctr.models.batch_norm import BatchNorm
from tessera.ctr.models.dropout import Dropout
from tessera.ctr.models.numeric import Raw, ScaledVectors
from tessera.ctr.models.tower import Fields
from tessera.embedding.errors import ConfigError

ROWS_AT_ONCE = 128


class VectorProjections(nn.Module):
    """One matrix for each vector field, e_i = W_i x_i."""

    def __init__(self, lengths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.lengths = list(lengths)
        self.matrices = nn.ModuleList(linear(length, dim, bias=False) for length in lengths)

    def forward(self, vectors_bn: Tensor) -> Tensor:
        """Map vectors side by side, [B, sum of lengths], to [B, vector fields, dim]."""
        parts = zip(self.matrices, vectors_bn.split(self.lengths, 1), strict=True)
        return torch.stack([matrix(part) for matrix, part in parts], 1)


class FieldEmbedding(nn.Module):
    """All fields of a row as vectors of one length: numeric ones first, then vector fields, each by a matrix of its
    own, then ids.

    Attributes:
        count: number F of vectors per row; with `numeric=raw` the id fields alone.
        inputs: width of `flat`, F * dim and with `numeric=raw` the numeric input's.
    """

    def __init__(self, fields: Fields, dim: int, *, side_by_side: bool = False) -> None:
        """side_by_side: the tower reads `flat` alone. Vector fields are then in it as they are, and not among the F."""
        super().__init__()
        need_positive(embedding_dim=dim)
        # No module without numeric fields: data parallel refuses parameters that get no gradient.
        self.numeric = fields.embed_numeric(len(fields.numeric), dim) if fields.numeric else None
        self.raw = isinstance(fields.embed_numeric(1, dim) if fields.vectors else self.numeric, Raw)
        self.scalars = len(fields.numeric)
        whole = bool(fields.vectors) and not (self.raw or side_by_side)
        self.vectors = VectorProjections(list(fields.vectors.values()), dim) if whole else None
        self.count = len(fields.ids) if self.raw else len(fields) - (0 if whole else len(fields.vectors))
        self.dim = dim
        # Numbers that `flat` has as they are begin here.
        self._raw_from = 0 if self.raw else self.scalars if fields.vectors and not whole else None
        self.inputs = self.count * dim + (0 if self._raw_from is None else fields.columns - self._raw_from)

    def forward(self, numeric_bn: Tensor, emb_bfd: Tensor) -> Tensor:
        """Map [B, columns], [B, id fields, dim] to [B, F, dim]."""
        if self.raw or (self.numeric is None and self.vectors is None):
            return emb_bfd
        parts = [] if self.numeric is None else [self.numeric(scalars_of(numeric_bn, self.scalars))]
        parts += [] if self.vectors is None else [self.vectors(numeric_bn[:, self.scalars :])]
        return torch.cat([*parts, emb_bfd], 1)

    def flat(self, numeric_bn: Tensor, emb_bfd: Tensor) -> Tensor:
        """Return the input of dense layers, [B, inputs]: `emb_bfd` (as `forward` returns it) side by side, and raw
        values."""
        if self._raw_from is None:
            return emb_bfd.flatten(1)
        return torch.cat([emb_bfd.flatten(1), numeric_bn[:, self._raw_from :] if self._raw_from else numeric_bn], 1)


def scalars_of(numeric_bn: Tensor, count: int) -> Tensor:
    """Return the first `count` columns, those of one number each; the tensor itself where there are no others, so that
    an exported graph has no slice."""
    return numeric_bn if numeric_bn.shape[1] == count else numeric_bn[:, :count]


class FirstOrder(nn.Module):
    """w0 + <w, x>: the linear part of LR, FM, Wide&Deep, DeepFM. Id weights come from the group "w" of dim T, one for
    each of T outputs.

    A numeric field's weight is its embedding of dim T, so that bucketised values have one weight per bucket; raw
    values have one each, and so have the numbers of a vector field.
    """

    def __init__(self, fields: Fields) -> None:
        super().__init__()
        self.outputs = fields.outputs
        numeric = fields.embed_numeric(len(fields.numeric), self.outputs) if fields.numeric else None
        self.numeric = ScaledVectors(len(fields.numeric), self.outputs) if isinstance(numeric, Raw) else numeric
        self.scalars, lengths = len(fields.numeric), list(fields.vectors.values())
        self.vectors = VectorProjections(lengths, self.outputs) if lengths else None
        self.bias = nn.Parameter(torch.zeros(self.outputs if self.outputs > 1 else ()))

    def forward(self, numeric_bn: Tensor, weight_bft: Tensor) -> Tensor:
        """Map [B, columns], [B, id fields, T] to [B, T]; to [B] of one output."""
        over = (1, 2) if self.outputs == 1 else (1,)
        total = self.bias + weight_bft.sum(over)
        if self.numeric is not None:
            total = total + self.numeric(scalars_of(numeric_bn, self.scalars)).sum(over)
        return total if self.vectors is None else total + self.vectors(numeric_bn[:, self.scalars :]).sum(over)


class FactorizationMachine(nn.Module):
    """Sum of all pairwise inner products by the identity 1/2 ((sum_i e_i)^2 - sum_i e_i^2), O(F D) (DeepFM eq. 2).

    Of several outputs each weighs the D coordinates of the sum for itself, <h_t, 1/2 (..)>, with h_t 1 at first: what
    fields have in common may say the one thing of one label and less, or the opposite, of another.
    """

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(outputs, dim)) if outputs > 1 else None

    def forward(self, emb_bfd: Tensor) -> Tensor:
        """Map [B, F, D] to [B, outputs]; to [B] of one output."""
        if self.weight is None:
            return _SumOfPairs.apply(emb_bfd)
        return 0.5 * (emb_bfd.sum(1).square() - emb_bfd.square().sum(1)) @ self.weight.T


class _SumOfPairs(torch.autograd.Function):
    """No squares of all embeddings are kept, and their gradient, sum_j e_j - e_i, is written once; autograd's would go
    over the embeddings five times."""

    @staticmethod
    def forward(ctx: Any, emb_bfd: Tensor) -> Tensor:
        sum_bd = emb_bfd.sum(1)
        ctx.save_for_backward(emb_bfd, sum_bd)
        sum_of_square = torch.linalg.vector_norm(emb_bfd.flatten(1), dim=1).square()
        return 0.5 * (sum_bd.square().sum(1) - sum_of_square)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_b: Tensor) -> Tensor:
        emb_bfd, sum_bd = ctx.saved_tensors
        return torch.sub(sum_bd.unsqueeze(1), emb_bfd).mul_(grad_b[:, None, None])


class InnerProducts(nn.Module):
    """All pairwise inner products <e_i, e_j>, i < j, from one Gram matrix per row (PNN 3.2), in the order of `pairs`.

    Attributes:
        count: F (F - 1) / 2.
    """

    place: Tensor

    def __init__(self, fields: int) -> None:
        super().__init__()
        first, second = pairs(fields)
        self.count = len(first)
        self.register_buffer("place", first * fields + second, persistent=False)

    def forward(self, emb_bfd: Tensor) -> Tensor:
        """Map [B, F, D] to [B, count]."""
        if emb_bfd.is_cuda:
            return torch.bmm(emb_bfd, emb_bfd.transpose(1, 2)).flatten(1).index_select(1, self.place)
        return _UpperGram.apply(emb_bfd)


class _UpperGram(torch.autograd.Function):
    """The Gram matrix above its diagonal, on the CPU: copying F slices is faster than an index of F^2 / 2 places, and
    the backward pass twice as fast as autograd's, which would add up into a zeroed matrix one place at a time."""

    @staticmethod
    def forward(ctx: Any, emb_bfd: Tensor) -> Tensor:
        gram_bff = torch.bmm(emb_bfd, emb_bfd.transpose(1, 2))
        ctx.save_for_backward(emb_bfd.to(gram_bff.dtype))  # autocast is off in the backward pass
        ctx.dtype = emb_bfd.dtype
        return torch.cat([gram_bff[:, i, i + 1 :] for i in range(gram_bff.shape[1] - 1)], 1)

    @staticmethod
    def backward(ctx: Any, grad_bp: Tensor) -> Tensor:
        (emb_bfd,) = ctx.saved_tensors
        fields = emb_bfd.shape[1]
        grad_bff = grad_bp.new_zeros(len(grad_bp), fields, fields)
        for i, part in enumerate(grad_bp.split(list(range(fields - 1, 0, -1)), 1)):
            grad_bff[:, i, i + 1 :] = part
        return torch.bmm(grad_bff, emb_bfd).baddbmm_(grad_bff.transpose(1, 2), emb_bfd).to(ctx.dtype)


class MLP(nn.Sequential):
    """Linear, (batch norm), ReLU, dropout per hidden layer, then one linear output of `outputs` units.

    With `outputs` None the last hidden layer is the output, `width` units wide.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        dropout: float = 0.0,
        *,
        batch_norm: bool = False,
        outputs: int | None = 1,
    ) -> None:
        layers: list[nn.Module] = []
        for width in hidden:
            # A norm cancels a bias, whose gradient is then rounding noise: it differs between numbers of ranks, and
            # Adam would scale it up to whole steps.
            layers.append(linear(inputs, width, bias=not batch_norm))
            if batch_norm:
                layers.append(BatchNorm(width))
            layers.append(nn.ReLU())
            if dropout:
                layers.append(Dropout(dropout))
            inputs = width
        if outputs is not None:
            layers.append(linear(inputs, outputs))
        super().__init__(*layers)
        self.width = inputs if outputs is None else outputs


def label_logits(x_bt: Tensor) -> Tensor:
    """Return what a tower answers: [B] for one label, [B, T] for several.

    A `squeeze` that changes nothing would stay in an exported graph, and ONNX refuses it.
    """
    return x_bt.squeeze(1) if x_bt.shape[1] == 1 else x_bt


def in_pieces(function: Callable[..., Tensor], rows: Tensor, keys: Tensor | None = None) -> Tensor:
    """Return `function(rows)`, which treats every row alike, computed in pieces of the batch if that is faster; or
    `function(rows, keys)` if each row has a key for its random draws.

    Whatever is made per pair of fields is far larger than a CPU's cache; a piece of it is not, and the products over
    a piece are still long enough. A GPU wants the whole batch.
    """
    if rows.is_cuda or torch.compiler.is_compiling():  # which would repeat the code for every piece
        return function(rows) if keys is None else function(rows, keys)
    if keys is None:
        return torch.cat([function(piece) for piece in rows.split(ROWS_AT_ONCE)])
    pieces = zip(rows.split(ROWS_AT_ONCE), keys.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([function(piece, keys_of_piece) for piece, keys_of_piece in pieces])


def linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Return a layer W x + b with W Xavier normal and b zero, as most public CTR code begins."""
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def pairs(fields: int) -> tuple[Tensor, Tensor]:
    """Return the pairs i < j of `fields` fields, two int64 vectors of F (F - 1) / 2: (0,1), (0,2), .., (1,2), .."""
    first, second = torch.triu_indices(fields, fields, 1)
    return first, second


def need_positive(**values: int) -> None:
    """Raise ConfigError where the value of a key of the model is below 1."""
    for key, value in values.items():
        if value < 1:
            raise ConfigError(f"model.{key} is {value}; expected at least 1")


def need_pairs(model: str, embedded: int) -> None:
    """Raise ConfigError where a model of interactions has fewer than two embedded fields."""
    if embedded < 2:
        raise ConfigError(
            f"model.target is {model}, which crosses fields, but the schema gives it {embedded} embedded field(s); "
            "expected at least 2 (numeric=raw embeds no numeric field), or a model such as dnn"
        )
