"""Cross two categorical features: one id for each pair of their ids, as the reader of training and the scorer of
exports both make it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from tessera.ctr.data.bags import Bags, offsets_of
from tessera.ctr.data.features import Feature
from tessera.ctr.data.single_values import Singles

Ids = Singles | Bags  # of one feature, decoded


def pair_number(feature: Feature) -> int:
    """Return the number of a cross, 64 bits with a sign. It follows from the names of what is crossed, so a cross keeps
    its ids wherever it stands in a schema, whatever others come and go."""
    names = [member.name for member in feature.members]
    text = "\0".join(sorted(names) if feature.symmetric else names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def pair_ids(a: np.ndarray, b: np.ndarray, number: int, *, symmetric: bool = False) -> np.ndarray:
    """Return mix64(3 mix64(a xor number) + mix64(b)), int64 [n], of ids int64 [n] each; symmetric: of a pair in either
    order the same.

    Both ids are mixed before they meet, so that ids that lie close together do not make their pairs meet; the factor
    keeps (a, b) apart from (b, a).
    """
    # Imported late: the mixer is a torch op, and processes that cross nothing need no torch here.
    import torch

    from tessera.kernels.mix import mix64

    if symmetric:
        a, b = np.minimum(a, b), np.maximum(a, b)
    # Copies, because Arrow's memory is read-only, and int64 whatever the stored width.
    first = torch.from_numpy(a.astype(np.int64) ^ np.int64(number))
    return mix64(mix64(first) * 3 + mix64(torch.from_numpy(b.astype(np.int64)))).numpy()


def crossed(feature: Feature, members: Sequence[Ids]) -> Ids:
    """Return the pairs of n rows: Singles of two features of one id, else Bags of the first `max_length` pairs. Ids of
    one row may stand beside those of n, as one user's beside those of many items: they are not copied.

    A row's pairs are those of its first id of the first feature with each of the second's, then of its second id, and
    so on. Without ids on one side there is none.
    """
    a, b = members
    number, symmetric = pair_number(feature), feature.symmetric
    if isinstance(a, Singles) and isinstance(b, Singles):
        ids = pair_ids(a.values, b.values, number, symmetric=symmetric)
        there = a.there if b.there is None else b.there if a.there is None else a.there & b.there
        there = None if there is None else np.broadcast_to(there, ids.shape)
        return Singles(ids, there, None, lambda row: ids[row])
    first, second = as_bags(a), as_bags(b)
    firsts, seconds = np.broadcast_arrays(np.diff(first.offsets), np.diff(second.offsets))
    starts, others = np.broadcast_arrays(first.offsets[:-1], second.offsets[:-1])
    pairs = firsts * seconds
    if feature.max_length is not None:
        pairs = np.minimum(pairs, feature.max_length)
    offsets = offsets_of(pairs)
    pair = np.arange(offsets[-1]) - np.repeat(offsets[:-1], pairs)
    row, column = np.divmod(pair, np.repeat(seconds, pairs))
    left = first.values[np.repeat(starts, pairs) + row]
    right = second.values[np.repeat(others, pairs) + column]
    return Bags(pair_ids(left, right, number, symmetric=symmetric), offsets, None)


def as_bags(ids: Ids) -> Bags:
    """Return single ids as bags of at most one id."""
    if isinstance(ids, Bags):
        return ids
    values = ids.values.astype(np.int64, copy=False)
    if ids.there is None:
        return Bags(values, np.arange(len(values) + 1), None)
    return Bags(values[ids.there], offsets_of(ids.there), None)
