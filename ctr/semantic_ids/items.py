"""Items with their codes: folders that hold them, and the index of an item among those with the same codes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tessera.ctr.data import columns
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.listing import list_files
from tessera.ctr.semantic_ids.codebooks import Codebooks
from tessera.ctr.semantic_ids.vectors import item_kind, items_keys

CODEBOOKS, REPORT, ITEMS = "codebooks.safetensors", "semantic_ids.json", "items"


@dataclass(frozen=True)
class Folder:
    """What `tessera prepare semantic-ids` wrote. codebooks: with `report`, all that new items need.

    keys: int64 [n], of the items; codes: int32 [n, levels], one more with a collision level; sids: int64, of the shape
    of the codes.
    """

    path: Path
    codebooks: Codebooks
    report: dict[str, Any]
    item_type: pa.DataType
    keys: np.ndarray
    codes: np.ndarray
    sids: np.ndarray

    @property
    def kind(self) -> str:
        return item_kind(self.item_type, str(self.path))

    @staticmethod
    def load(path: Path) -> Folder:
        """Read a folder. Raises DataError: it is none, or its parts do not belong together."""
        try:
            report = json.loads((path / REPORT).read_text())
        except (OSError, ValueError):
            raise DataError(f"{path}: no {REPORT} found, expected a folder of tessera prepare semantic-ids") from None
        codebooks = Codebooks.load(path / CODEBOOKS)
        if report["version"] != codebooks.version:
            raise DataError(f"{path}: {REPORT} is of version {report['version']}, {CODEBOOKS} of {codebooks.version}")
        keys, codes, sids = [], [], []
        width = codebooks.levels + bool(report["collision_level"])
        item_type = None
        for file in list_files(str(path / ITEMS)).files:
            with file.open() as parquet:
                for batch in parquet.iter_batches(1 << 16):
                    items = columns.plain(batch.column(0))
                    item_type = items.type
                    keys.append(items_keys(items))
                    codes.append(batch.column("codes").flatten().to_numpy().reshape(-1, width))
                    sids.append(batch.column("sid").flatten().to_numpy().reshape(-1, width))
        if item_type is None:
            raise DataError(f"{path / ITEMS}: no items found, expected at least one")
        return Folder(path, codebooks, report, item_type, *map(np.concatenate, (keys, codes, sids)))


def indices_in_buckets(
    buckets: np.ndarray, keys: np.ndarray, earlier: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Return for each item a number that no other item of its bucket has, int32 [n]: 0, 1, .. in the order of keys.

    Args:
        buckets: int64 [n], the same for items with the same codes; keys: int64 [n], of the items.
        earlier: buckets, keys and indices of items that have one. An item that is among them with the same bucket
            keeps it; others take the numbers after the largest one of their bucket.
    """
    found = np.full(len(keys), -1, np.int64)
    first: np.ndarray = np.zeros(len(keys), np.int64)
    if earlier is not None and len(earlier[0]):
        of_bucket, of_key, index = earlier
        order = np.argsort(of_key, kind="stable")
        at = order[np.minimum(np.searchsorted(of_key[order], keys), len(order) - 1)]
        same = (of_key[at] == keys) & (of_bucket[at] == buckets)
        found[same] = index[at[same]]
        known, place = np.unique(of_bucket, return_inverse=True)
        largest = np.full(len(known), -1, np.int64)
        np.maximum.at(largest, place, index)
        at = np.minimum(np.searchsorted(known, buckets), len(known) - 1)
        first = np.where(known[at] == buckets, largest[at] + 1, 0)
    new = np.flatnonzero(found < 0)
    order = new[np.lexsort((keys[new], buckets[new]))]
    begins = np.flatnonzero(np.diff(buckets[order], prepend=buckets[order][:1] - 1))
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(np.append(begins, len(order))))
    found[order] = first[order] + rank
    return found.astype(np.int32)
