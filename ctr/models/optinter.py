"""OptInter (Lyu et al., ICDE 2022, arXiv 2108.01265): each pair of fields is memorised, factorised or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, need_pairs, need_positive
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError, did_you_mean

CHOICES = ("memorise", "factorise", "naive")
COLDEST = 0.01


class OptInter(Tower):
    """y = sigmoid(MLP(concat(e_1, .., e_F, {o_ab : a < b})))

    o_ab = p_mem c_ab + p_fac (s_a * s_b) + p_naive 0,   (p_mem, p_fac, p_naive) = softmax(alpha_ab / t)
    t = max(0.01, 1 - temperature_decay x step)

    c_ab is the vector of the cross of a and b, a feature of the schema (`kind: cross`); a pair without one is
    factorised or left out. s_a are vectors of their own with `pair_dim` columns, or e_a. alpha and all else are trained
    together, and alpha begins at 0. With `factorise` nothing is searched: these pairs are multiplied, every cross of
    the schema is memorised, and other pairs are no input.

    Attributes:
        pairs: names of the two fields of each pair that is searched, those with a cross first.
    """

    has_heads = True
    step: Tensor
    cannot: Tensor

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        pair_dim: int | None,
        factorise: Sequence[Sequence[str]] | None,
        temperature_decay: float,
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        own, crosses = _own_and_crosses(fields)
        self.embed = FieldEmbedding(own, embedding_dim)
        names = own.ids if self.embed.raw else (*own.numeric, *own.vectors, *own.ids)
        place = {name: at for at, name in enumerate(names)}
        crossed = {_pair(one, place): name for name, one in crosses.items()}
        self.searches = factorise is None
        if factorise is None:
            need_pairs("OptInter", self.embed.count)
            rest = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names)) if (a, b) not in crossed]
            products = [*crossed, *rest]
            self.alpha = nn.Parameter(torch.zeros(len(products), len(CHOICES)))
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
            cannot = torch.zeros(len(products), len(CHOICES), dtype=torch.bool)
            cannot[len(crossed) :, 0] = True
            self.register_buffer("cannot", cannot, persistent=False)
        else:
            products = [_pair(_named(one, names), place) for one in factorise]
        self.embedding_dims, dim = {"v": embedding_dim}, embedding_dim
        self.embed_pairs: FieldEmbedding | None = None
        if pair_dim is not None and (products or crossed):
            need_positive(pair_dim=pair_dim)
            self.embedding_dims["s"] = dim = pair_dim
            self.embed_pairs = FieldEmbedding(own, dim) if products else None
        self.pairs = tuple((names[a], names[b]) for a, b in products)
        self._decay, self._crosses = temperature_decay, len(crossed)
        self.register_buffer("first", torch.tensor([a for a, _ in products], dtype=torch.int64), persistent=False)
        self.register_buffer("second", torch.tensor([b for _, b in products], dtype=torch.int64), persistent=False)
        self._own = [fields.ids.index(name) for name in own.ids]
        self._crossed = [fields.ids.index(name) for name in crossed.values()]
        outputs = len(products) if self.searches else len(products) + len(crossed)
        inputs = self.embed.inputs + outputs * dim
        self.mlp = MLP(inputs, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def begin_step(self, step: int) -> None:
        if self.searches:
            self.step.fill_(step)

    def shares(self) -> Tensor:
        """Return p of each of `pairs`, float [pairs, 3] in the order of CHOICES, at the step that is trained."""
        temperature = (1 - self._decay * self.step).clamp(min=COLDEST)
        return torch.softmax(self.alpha.masked_fill(self.cannot, -torch.inf) / temperature, 1)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, _of(embeddings["v"], self._own))
        found = embeddings.get("s", embeddings["v"])
        memorised = _of(found, self._crossed)
        pairs_bfd = emb_bfd if self.embed_pairs is None else self.embed_pairs(numeric_bn, _of(found, self._own))
        products = pairs_bfd.index_select(1, self.first) * pairs_bfd.index_select(1, self.second)
        if not self.pairs:
            outputs = memorised
        elif self.searches:
            p = self.shares().to(products.dtype)
            products = products * p[:, 1:2]
            both = memorised * p[: self._crosses, :1] + products[:, : self._crosses]
            outputs = torch.cat([both, products[:, self._crosses :]], 1)
        else:
            outputs = torch.cat([products, memorised], 1)
        return label_logits(self.mlp(torch.cat([self.embed.flat(numeric_bn, emb_bfd), outputs.flatten(1)], 1)))


def _of(emb_bfd: Tensor, places: Sequence[int]) -> Tensor:
    """Return the vectors of these fields; those that stand side by side without a copy."""
    if list(places) == list(range(emb_bfd.shape[1])):
        return emb_bfd
    return emb_bfd[:, list(places)]


def _own_and_crosses(fields: Fields) -> tuple[Fields, dict[str, tuple[str, str]]]:
    """Return the fields that are no cross of two others of them, and those that are, with the two.

    A cross whose members are not all there is a field like any other.
    """
    known = {*fields.numeric, *fields.vectors, *fields.ids} - {name for name, _, _ in fields.crosses}
    crosses: dict[str, tuple[str, str]] = {}
    by_pair: dict[frozenset[str], str] = {}
    for name, a, b in fields.crosses:
        if a == b or not {a, b} <= known:
            continue
        other = by_pair.setdefault(frozenset((a, b)), name)
        if other != name:
            raise ConfigError(
                f"model.target is OptInter, and {other!r} and {name!r} both cross {a!r} with {b!r}; expected one cross "
                "of a pair"
            )
        crosses[name] = (a, b)
    ids = tuple(name for name in fields.ids if name not in crosses)
    return replace(fields, ids=ids, crosses=()), crosses


def _named(pair: Sequence[str], names: Sequence[str]) -> tuple[str, str]:
    """Return a pair of model.factorise. Raises ConfigError: something else than two embedded fields."""
    if isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
        raise ConfigError(f"model.factorise has {pair!r}; expected pairs of two fields, as [[user, item]]")
    for name in pair:
        if name not in names:
            hint = did_you_mean(str(name), names, f"fields with vectors are {', '.join(names)}", form="{}")
            raise ConfigError(f"model.factorise names {name!r}, no embedded field{hint}")
    return pair[0], pair[1]


def _pair(names: tuple[str, str], place: dict[str, int]) -> tuple[int, int]:
    a, b = sorted(place[name] for name in names)
    return a, b
