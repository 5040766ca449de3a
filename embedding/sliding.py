"""Count ids in a fixed amount of memory, and forget the oldest of them: Monolith's sliding hash filter, by batches.

The memory is a ring of `splits` equal parts, each of buckets of 16 cells. A cell is 16 bits: a signature (12 bits of
a hash, never 0) and a counter (4 bits, stops at 15); 0 is an empty cell. An id has one bucket in every part. New ids
go into the head part; when it is 1/1.2 full the head moves on, and the part AHEAD + 1 places further, the oldest, is
emptied to become the last one ahead. What an id had counted in an older part is carried over into the head when it
is seen again, and is forgotten when it was not seen for as long as the ring takes to turn.

One batch, which defines what a sequence of insertions would leave open:
1. If the head is full it moves on (once).
2. Ids with the same bucket and signature are one id from here on; their counts are added.
3. An id is looked for in its buckets, in the AHEAD parts before the head, the head and the older ones, in this order;
   the first cell with its signature tells its old count (0 without one). New count = old + count, at most 15.
4. If that cell is in the head or ahead, it takes the new count. Otherwise the id takes an empty cell of its bucket in
   the head; ids of one bucket take them in order of first occurrence. Where none is left, the same is done one part
   ahead, and so on.
5. An id passes if its new count reaches the threshold, or if it found no place (the filter fails open).

Foreign ids may share a cell: with P parts in use and buckets nearly full, about 13 P of 4095 unknown ids find the
count of another. The filter errs towards admission only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tessera.kernels.mix import mix64
from tessera.kernels.unique import unique_inverse

WAYS = 16  # cells of a bucket
AHEAD = 2  # parts that take what does not fit the head
FILL = 1.2
COUNTER_MAX = 15
SIGNATURES = 4095
_HASH_OFFSET = 0x243F6A8885A308D3  # apart from the hashes that choose the rank and the place in the id map


class SlidingHashFilter:
    """capacity: ids remembered at least, in splits - AHEAD - 1 full parts. Cells take 2 bytes each."""

    def __init__(self, threshold: int, capacity: int, splits: int = 7, device: torch.device | str = "cpu") -> None:
        assert 1 <= threshold <= COUNTER_MAX and splits > AHEAD + 1 and capacity >= 1
        self._threshold = threshold
        self._splits = splits
        self._buckets = math.ceil(capacity * FILL / (splits - AHEAD - 1) / WAYS)
        self._cells = torch.zeros((splits * self._buckets, WAYS), dtype=torch.int16, device=device)
        self._used = [0] * splits
        self._head = 0

    @property
    def nbytes(self) -> int:
        return self._cells.numel() * 2

    def admit(self, ids: Tensor, counts: Tensor, now: int | Tensor, step: int) -> Tensor:
        """Return which ids pass, bool [u], as described in `embedding/admission.py`; `now` and `step` are ignored."""
        self._slide()
        bucket, signature = self._place_of(ids)
        key, inverse, _ = unique_inverse(bucket * (SIGNATURES + 1) + signature)
        counts = torch.zeros_like(key).index_add_(0, inverse, counts)
        bucket, signature = key // (SIGNATURES + 1), key % (SIGNATURES + 1)
        passed = self._add(bucket, signature, counts)
        return passed[inverse]

    def _slide(self) -> None:
        if self._used[self._head] * FILL < self._buckets * WAYS:
            return
        self._head = (self._head + 1) % self._splits
        emptied = (self._head + AHEAD) % self._splits
        self._cells[emptied * self._buckets : (emptied + 1) * self._buckets] = 0
        self._used[emptied] = 0

    def _place_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (bucket, signature 1..4095) of ids: from the lower 40 and the upper 24 bits of a hash."""
        hashes = mix64(ids + _HASH_OFFSET)
        bucket = (hashes & ((1 << 40) - 1)) % self._buckets
        return bucket, ((hashes >> 40) & ((1 << 24) - 1)) % SIGNATURES + 1

    def _add(self, bucket: Tensor, signature: Tensor, counts: Tensor) -> Tensor:
        """Run steps 3 to 5 for distinct pairs. Returns bool [m]."""
        order = [(self._head + AHEAD - age) % self._splits for age in range(self._splits)]
        rows_sm = torch.tensor(order, device=bucket.device)[:, None] * self._buckets + bucket
        cells_smw = self._cells.index_select(0, rows_sm.flatten()).view(*rows_sm.shape, WAYS)
        # 16 bits as int16: the upper 12 come out of the shift with a sign.
        signed = torch.where(signature < 2048, signature, signature - 4096).to(torch.int16)
        match_sm = ((cells_smw >> 4) == signed[:, None]).view(torch.uint8).max(dim=2)
        part = match_sm.values.max(dim=0)
        known, age = part.values.bool(), part.indices
        way = match_sm.indices.gather(0, age[None])[0]
        cell = rows_sm.gather(0, age[None])[0] * WAYS + way
        flat = self._cells.view(-1)
        old = torch.where(known, flat[cell].to(torch.int64) & COUNTER_MAX, 0)
        new = (old + counts).clamp(max=COUNTER_MAX)
        value = ((signed.to(torch.int64) << 4) | new).to(torch.int16)

        here = known & (age <= AHEAD)
        flat[cell[here]] = value[here]
        left = (~here).nonzero().flatten()
        for ahead in range(AHEAD + 1):
            if left.numel() == 0:
                break
            left = self._fill(cells_smw[AHEAD - ahead], rows_sm[AHEAD - ahead], value, left, order[AHEAD - ahead])
        passed = new >= self._threshold
        passed[left] = True
        return passed

    def _fill(self, cells_mw: Tensor, rows: Tensor, value: Tensor, left: Tensor, split: int) -> Tensor:
        """Put the pairs `left` into empty cells of one part. Returns those that found none."""
        rank = _rank_in_bucket(rows[left])
        empty = cells_mw[left] == 0
        chosen = empty & (empty.cumsum(dim=1) == rank[:, None] + 1)
        placed, way = chosen.nonzero().unbind(1)
        at = left[placed]
        self._cells.view(-1)[rows[at] * WAYS + way] = value[at]
        self._used[split] += placed.numel()
        missed = torch.ones_like(left, dtype=torch.bool)
        missed[placed] = False
        return left[missed]

    def expire(self, now: int, budget_rows: int | None = None) -> None:
        """Do nothing: the ring forgets by itself."""

    def export_state(self) -> dict[str, Tensor]:
        """Return cells int16 [splits * buckets, 16], used int64 [splits], head int64 []. It cannot be cut by id."""
        return {"cells": self._cells.clone(), "used": torch.tensor(self._used), "head": torch.tensor(self._head)}

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Continue as the exporting filter, which must have had the same size. Raises ValueError for another."""
        if state["cells"].shape != self._cells.shape or len(state["used"]) != self._splits:
            found, expected = list(state["cells"].shape), list(self._cells.shape)
            raise ValueError(f"sliding filter: expected {self._splits} parts, cells {expected}, found {found}")
        self._cells.copy_(state["cells"])
        self._used = state["used"].tolist()
        self._head = int(state["head"])


def _rank_in_bucket(rows: Tensor) -> Tensor:
    """Return the number of earlier elements with the same value: int64 [n]."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    place = torch.arange(rows.numel(), device=rows.device)
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    rank = torch.empty_like(rows)
    rank[order] = place - torch.where(begins, place, 0).cummax(0).values
    return rank
