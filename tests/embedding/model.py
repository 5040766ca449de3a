"""A dynamic table in plain Python: what `DynamicTable` must do, one id at a time. Adagrad on float32."""

import numpy as np
import torch

from tessera.kernels.random import normal


class Full(Exception):
    """The table would raise TableFull."""


class Row:
    def __init__(self, number, values, state):
        self.number, self.values, self.state = number, values, state
        self.last_seen, self.count, self.mark = None, 0, 0

    def touch(self, now, count):
        self.last_seen = now if self.last_seen is None else max(self.last_seen, now)
        self.count += count


class ModelTable:
    def __init__(self, config):
        self.config = config
        self.rows = {}  # id -> Row
        self.pending = {}  # id -> [count, last seen], exact admission
        self.pending_rows, self.pending_free, self.pending_end, self.pending_cursor = {}, [], 0, 0
        self.free, self.end, self.cursor = [], 0, 0
        self.mark = 0
        self.evicted_ids = set()
        self.total = dict.fromkeys(("new", "admitted", "rejected", "expired", "evicted"), 0)

    def lookup(self, ids, now, counts):
        """ids distinct. Returns the row number or None of each."""
        unknown = [i for i in ids if i not in self.rows]
        passed = [i for i in unknown if self._admit(i, now, counts[ids.index(i)])]
        self.total["new"] += len(unknown)
        self.total["admitted"] += len(passed)
        self.total["rejected"] += len(unknown) - len(passed)
        self.make_room(len(passed), keep=ids)
        for i in passed:
            self.add(i, *self.first(i)).mark = self.mark
        for i, count in zip(ids, counts, strict=True):
            if i in self.rows:
                self.rows[i].touch(now, count)
        return [self.rows[i].number if i in self.rows else None for i in ids]

    def _admit(self, i, now, count):
        admission = self.config.admission
        if admission.kind == "none":
            return True
        assert admission.kind == "exact"
        seen, last = self.pending.get(i, (0, now))
        if seen + count >= admission.threshold:
            self.pending.pop(i, None)
            return True
        self.pending[i] = (seen + count, max(last, now))
        return False

    def make_room(self, wanted, keep):
        limit = self.config.row_limit
        missing = 0 if limit is None else len(self.rows) + wanted - limit
        if missing <= 0:
            return
        candidates = [i for i in self.rows if i not in keep]
        if self.config.eviction == "raise" or missing > len(candidates):
            raise Full
        candidates.sort(key=lambda i: self._heat(self.rows[i]))
        for i in candidates[:missing]:
            self.give_up(i)
        self.total["evicted"] += missing

    def _heat(self, row):
        key = (row.last_seen, row.count) if self.config.eviction == "lru" else (row.count, row.last_seen)
        return *key, row.number

    def first(self, i):
        config, one = self.config, torch.tensor([i])
        values = [
            normal(config.seed, config.key(g), one, g.dim)[0].numpy() * np.float32(g.init_std) for g in config.groups
        ]
        width = sum(g.dim for g in config.groups)
        return np.concatenate(values), np.full(width, config.optimizer.initial_accumulator, np.float32)

    def add(self, i, values, state):
        if self.free:
            number = self.free.pop()
        else:
            number, self.end = self.end, self.end + 1
        self.rows[i] = Row(number, values, state)
        return self.rows[i]

    def give_up(self, i):
        self.free.append(self.rows.pop(i).number)
        self.evicted_ids.add(i)

    def update(self, ids, grads):
        """grads: one float32 array [width] per distinct id."""
        optimizer = self.config.optimizer
        for i, g in zip(ids, grads, strict=True):
            if i in self.rows:
                row = self.rows[i]
                row.state = row.state + g * g
                row.values = row.values - np.float32(optimizer.lr) * g / (
                    np.sqrt(row.state) + np.float32(optimizer.eps)
                )
                row.mark = self.mark

    def expire(self, now, budget):
        ttl = self.config.ttl_seconds
        by_number = {row.number: i for i, row in self.rows.items()}
        looked, expired = self.end if budget is None else min(budget, self.end), 0
        for _ in range(looked):
            if self.cursor >= self.end:
                self.cursor = 0
            i = by_number.get(self.cursor)
            if i is not None and now - self.rows[i].last_seen >= ttl:
                self.give_up(i)
                expired += 1
            self.cursor += 1
        self.total["expired"] += expired
        if budget is None:
            self.pending = {i: (n, last) for i, (n, last) in self.pending.items() if now - last < ttl}
        return expired

    def renumber(self):
        """What an export without row numbers and an import do."""
        for number, row in enumerate(sorted(self.rows.values(), key=lambda row: row.number)):
            row.number = number
        self.free, self.end, self.cursor = [], len(self.rows), 0

    def take_evicted(self):
        ids, self.evicted_ids = self.evicted_ids - set(self.rows), set()
        return ids
