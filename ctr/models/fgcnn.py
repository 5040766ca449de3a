"""FGCNN, feature generation by a convolutional network (Liu et al., WWW 2019, arXiv 1904.04447)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.ctr.instantiate import instantiate
from tessera.ctr.models.batch_norm import BatchNorm
from tessera.ctr.models.layers import FieldEmbedding, linear, need_pairs, need_positive
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

PADDINGS = ("end", "both")


class FGCNN(Tower):
    """New fields, generated from embeddings of their own, join the raw ones in any other model   (section 3)

    X^0 = E' (the fields in the schema's order; the convolution sees neighbours)
    C^l = tanh(conv over h fields (X^{l-1})),  X^l = max over p fields (C^l)
    R^l = tanh(W^l flatten(X^l) + b^l), m_r^l new fields per remaining field
    y   = classifier(E, R^1, .., R^L)

    Each id owns two rows: E' for the generation, E for the classifier. A classifier's first-order weights cover the
    raw fields; generated ones have no ids to weigh.
    """

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        channels: Sequence[int],
        kernel: int,
        pool: int,
        recombined: int,
        *,
        conv_batch_norm: bool,
        classifier: dict[str, Any],
        pool_padding: str = "end",
    ) -> None:
        super().__init__()
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("FGCNN", self.embed.count)
        _check(channels, kernel, pool, recombined, self.embed.count)
        pad_both = _pads_both(pool_padding, pool, len(channels), self.embed.count)
        self.generate = Generation(
            self.embed.count,
            embedding_dim,
            channels,
            kernel,
            pool,
            recombined,
            batch_norm=conv_batch_norm,
            pad_both=pad_both,
        )
        generated = tuple(f"generated_{number}" for number in range(self.generate.count))
        everything = replace(fields, ids=fields.ids + generated)
        self.classifier = instantiate(classifier, "model.classifier", everything, embedding_dim=embedding_dim)
        dims = self.classifier.embedding_dims
        if dims.get("v") != embedding_dim or not {"v", "w"}.issuperset(dims):
            raise ConfigError(
                f"model.classifier.target is {classifier['target']}; expected a model that reads one group of vectors"
            )
        self.has_heads = self.classifier.has_heads
        self.embedding_dims = {**self.classifier.embedding_dims, "generation": embedding_dim}

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        generated_bgd = self.generate(self.embed(numeric_bn, embeddings["generation"]))
        raw = {name: emb_bfd for name, emb_bfd in embeddings.items() if name != "generation"}
        return self.classifier(numeric_bn, {**raw, "v": torch.cat([raw["v"], generated_bgd], 1)})


class Generation(nn.Module):
    """Convolution, max-pooling and recombination: [B, F, D] -> [B, count, D] (section 3.2)

    Attributes:
        count: new fields over all layers.
    """

    def __init__(
        self,
        fields: int,
        dim: int,
        channels: Sequence[int],
        kernel: int,
        pool: int,
        recombined: int,
        *,
        batch_norm: bool,
        pad_both: bool = False,
    ) -> None:
        """pad_both: where fields are left over, as many stand before the first and behind the last as padding."""
        super().__init__()
        self.pool, self.dim, self.count, self.pad_both = pool, dim, 0, pad_both
        self.convolutions, self.norms, self.recombinations = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        inputs, convolutions = 1, []
        for outputs in channels:
            convolutions.append(nn.Conv2d(inputs, outputs, (1, kernel), padding=(0, kernel // 2), bias=not batch_norm))
            self.convolutions.append(convolutions[-1])
            self.norms.append(BatchNorm(outputs) if batch_norm else nn.Identity())
            fields = pooled_fields(fields, pool, pad_both=pad_both)
            self.recombinations.append(linear(fields * dim * outputs, fields * dim * recombined))
            self.count += fields * recombined
            inputs = outputs
        # As their gradients are, for data parallel's buckets.
        nn.utils.convert_conv2d_weight_memory_format(self.convolutions, torch.channels_last)
        for convolution in convolutions:
            nn.init.xavier_normal_(convolution.weight)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)

    def forward(self, emb_bfd: Tensor) -> Tensor:
        # An image of one channel, coordinates by fields, with the channels innermost in memory: there the CPU's
        # convolution and pooling are fastest and the recombination reads [D, fields, channels] as it lies.
        image_bcdf = emb_bfd.transpose(1, 2).unsqueeze(1).contiguous(memory_format=torch.channels_last)
        new_fields = []
        for convolution, norm, recombine in zip(self.convolutions, self.norms, self.recombinations, strict=True):
            image_bcdf = norm(convolution(image_bcdf))
            # tanh rises, so that the maximum may be taken first; a last pool may hold fewer fields.
            image_bcdf = torch.tanh(self._pooled(image_bcdf))
            generated = torch.tanh(recombine(image_bcdf.permute(0, 2, 3, 1).flatten(1)))
            new_fields.append(generated.unflatten(1, (-1, self.dim)))
        return torch.cat(new_fields, 1)

    def _pooled(self, image_bcdf: Tensor) -> Tensor:
        if self.pad_both:
            return F.max_pool2d(image_bcdf, (1, self.pool), padding=(0, image_bcdf.shape[3] % self.pool))
        return F.max_pool2d(image_bcdf, (1, self.pool), ceil_mode=True)


def pooled_fields(fields: int, pool: int, *, pad_both: bool) -> int:
    """Return how many fields pooling leaves."""
    return (fields + 2 * (fields % pool)) // pool if pad_both else -(-fields // pool)


def _pads_both(padding: str, pool: int, layers: int, fields: int) -> bool:
    """Return whether pools are padded at both ends. Raises ConfigError where they cannot be so."""
    if padding not in PADDINGS:
        raise ConfigError(f"model.pool_padding is {padding!r}; expected {' or '.join(PADDINGS)}")
    for _ in range(layers if padding == "both" else 0):
        if 2 * (fields % pool) > pool:
            raise ConfigError(
                f"model.pool_padding is both and model.pool {pool}, and {fields} fields leave {fields % pool}, more "
                "than half a pool; expected end, or pools of 2"
            )
        fields = pooled_fields(fields, pool, pad_both=True)
    return padding == "both"


def _check(channels: Sequence[int], kernel: int, pool: int, recombined: int, fields: int) -> None:
    if not channels:
        raise ConfigError("model.channels is empty; expected the feature maps of each layer, for example [14, 16]")
    if kernel < 1 or kernel % 2 == 0:
        raise ConfigError(f"model.kernel is {kernel}; expected an odd number of fields, so that it has a middle")
    if kernel > fields:
        raise ConfigError(f"model.kernel is {kernel}, higher than the {fields} embedded fields; expected at most that")
    need_positive(pool=pool, recombined=recombined)
