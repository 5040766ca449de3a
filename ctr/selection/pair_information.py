"""What a pair of fields says of the labels beyond what each field says alone, counted from rows of the training split.

    gain(a, b) = I(y; ab) - I(y; a) - I(y; b)

Nothing is trained. It finds pairs to cross, and is the cheap ranking beside OptInter's search.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tessera.ctr.config import Config
from tessera.ctr.data.schema import Schema, gives_ids
from tessera.ctr.train.evaluate import read_split
from tessera.distributed.collectives import gather_objects, on_first_rank
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError

Pair = tuple[str, str]


def fields_to_cross(schema: Schema) -> list[str]:
    """Return the features with one id per row that are no crosses, in order."""
    single = [one for one in schema.categorical if one.kind in ("id", "numeric") and gives_ids(one)]
    return [one.name for one in single if not one.members and one.pooling != "none"]


def pair_information(
    config: Config, schema: Schema, process: Process, pairs: Sequence[Pair], rows: int, threshold: int
) -> dict[Pair, float]:
    """Return the gain of each pair in nats, summed over labels, by the first `rows` rows of the training split's order.

    threshold: ids and pairs of ids seen less often count as one, as they would without a row of their own.

    Raises ConfigError: there is no training split.
    """
    reader = read_split(config, schema, process, "train")
    if reader is None:
        raise ConfigError("data.train is null; pairs are counted in it")
    names, batches = list(dict.fromkeys(itertools.chain(*pairs))), -(-rows // config.trainer.batch_size)
    parts = []
    for batch in itertools.islice(reader.epoch(0), batches):
        known = np.ones(batch.labels.shape, bool) if batch.known is None else batch.known.numpy()
        real = slice(0, batch.rows)
        ids = [_column(batch.ids, name)[:, real] for name in names]
        parts.append((np.stack(ids), batch.labels.numpy()[real], known[real]))
    mine = [np.concatenate([part[0] for part in parts], 2)] if parts else []
    mine += [np.concatenate([part[at] for part in parts]) for at in (1, 2)] if parts else []
    process.stage = "counting pairs"
    everyone = [one for one in gather_objects(mine) if one]
    return on_first_rank(process, lambda: _gains(names, pairs, everyone, threshold))


def gain_of(first: np.ndarray, second: np.ndarray, label: np.ndarray, threshold: int) -> float:
    """Return I(y; ab) - I(y; a) - I(y; b) in nats. first, second: numbers of ids, int64 [n] from 0; label: bool [n]."""
    both = np.unique(first * (int(second.max(initial=0)) + 1) + second, return_inverse=True)[1]
    whole, a, b = (_information(one, label, threshold) for one in (both, first, second))
    return whole - a - b


def _column(ids: KeyedJaggedTensor, name: str) -> np.ndarray:
    """Return ids and whether they are there, int64 [2, B]."""
    one = ids[name]
    there = one.lengths().numpy() > 0
    found = np.zeros((2, len(there)), np.int64)
    found[0, there], found[1] = one.values().numpy(), there
    return found


def _gains(
    names: Sequence[str], pairs: Sequence[Pair], everyone: Sequence[Sequence[np.ndarray]], threshold: int
) -> dict[Pair, float]:
    if not everyone:
        return dict.fromkeys(pairs, 0.0)
    ids, labels, known = (np.concatenate([one[at] for one in everyone], 2 if at == 0 else 0) for at in range(3))
    numbers = {}
    for name, (values, there) in zip(names, ids, strict=True):
        numbers[name] = np.where(there == 0, 0, np.unique(values, return_inverse=True)[1] + 1)
    found = dict.fromkeys(pairs, 0.0)
    for task in range(labels.shape[1]):
        rows = known[:, task]
        label = labels[rows, task]
        # A label that is any number is taken as above or below its mean.
        positive = label > (0.5 if np.isin(label, (0, 1)).all() else label.mean())
        for a, b in pairs:
            found[a, b] += gain_of(numbers[a][rows], numbers[b][rows], positive, threshold)
    return found


def _information(values: np.ndarray, label: np.ndarray, threshold: int) -> float:
    """Return I(y; x) of counts, without what chance gives it: (values - 1) / (2 rows) of a label of two values."""
    if not len(values):
        return 0.0
    counts = np.bincount(values)
    positives = np.bincount(values, weights=label)
    often = counts >= threshold
    counts = np.append(counts[often], counts[~often].sum())
    positives = np.append(positives[often], positives[~often].sum())
    positives, counts = positives[counts > 0], counts[counts > 0]
    rows = counts.sum()
    share = positives / counts
    whole = positives.sum() / rows
    return float(_entropy(whole) - (counts * _entropy(share)).sum() / rows - (len(counts) - 1) / (2 * rows))


def _entropy(p: np.ndarray) -> np.ndarray:
    q = 1 - p
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(p > 0, p * np.log(p), 0) - np.where(q > 0, q * np.log(q), 0)
