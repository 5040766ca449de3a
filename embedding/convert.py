"""Convert rows from one format to another, and measure the error of the conversion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.row_batch import RowBatch
from tessera.kernels.formats import code_range, is_int, stored_dtype
from tessera.kernels.quantise import dequantise, quantise


@dataclass
class ConversionError:
    """Difference of one group's values before and after conversion: sums over rows."""

    rows: int = 0
    values: int = 0
    squares: float = 0.0
    squared_errors: float = 0.0
    largest: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add values float32 [n, dim] before and after conversion."""
        difference = (after.double() - before.double()).abs()
        self.rows += before.shape[0]
        self.values += before.numel()
        self.squares += float(before.double().square().sum())
        self.squared_errors += float(difference.square().sum())
        self.largest = max(self.largest, float(difference.max()) if difference.numel() else 0.0)

    def __str__(self) -> str:
        rms, error = ((total / max(1, self.values)) ** 0.5 for total in (self.squares, self.squared_errors))
        return f"{self.rows:,} rows · rms value {rms:.6f} · rms error {error:.2e} · largest error {self.largest:.2e}"


def convert_rows(
    batch: RowBatch, source: DynamicTableConfig, target: DynamicTableConfig, errors: dict[str, ConversionError]
) -> RowBatch:
    """Return rows of `source` as `target` stores them, rounded to nearest; both have the same groups, dims and
    optimizer.

    A row that becomes int gets the smallest scale with which all its values are in range. The state of a learned
    scale starts at zero. errors: by group name, added to.
    """
    values, states, scales = [], [], []
    columns = [source.values_columns(group) for group in source.groups]
    widths = [sum(source.state_widths(group)) for group in source.groups]
    pairs = zip(source.groups, target.groups, strict=True)
    parts = zip(pairs, batch.values.split(columns, 1), batch.state.split(widths, 1), strict=True)
    for number, ((old, new), stored, state) in enumerate(parts):
        old_scales = None if batch.scale is None else batch.scale[:, number].contiguous()
        floats = _values(stored, old, old_scales)
        if old.format == new.format:
            stored, size = _in_its_dtype(stored, new), old_scales
        else:
            size = _steps(floats, new) if is_int(new.format) else None
            stored = quantise(floats, size, new.format, rounding="nearest")
        errors.setdefault(new.name, ConversionError()).add(floats, _values(stored, new, size))
        values.append(stored.view(target.values_dtype))
        kept, more = target.state_widths(new)
        states.append(torch.cat([state[:, :kept], state.new_zeros((len(state), more))], dim=1))
        scales.append(state.new_zeros(len(state)) if size is None else size)
    return RowBatch(
        ids=batch.ids,
        values=torch.cat(values, dim=1),
        state=torch.cat(states, dim=1),
        last_seen=batch.last_seen,
        count=batch.count,
        scale=torch.stack(scales, dim=1) if target.has_scales else None,
        decay=batch.decay,
    )


def values_of(batch: RowBatch, config: DynamicTableConfig, number: int) -> Tensor:
    """Return the values of one group of rows, float32 [n, dim], as they are stored."""
    columns = [config.values_columns(group) for group in config.groups]
    scales = None if batch.scale is None else batch.scale[:, number].contiguous()
    return _values(batch.values.split(columns, 1)[number], config.groups[number], scales)


def _values(stored: Tensor, group: Group, scales: Tensor | None) -> Tensor:
    return dequantise(_in_its_dtype(stored, group), scales if is_int(group.format) else None, group.format, group.dim)


def _in_its_dtype(stored: Tensor, group: Group) -> Tensor:
    # Bytes of a single row count as contiguous at any address; a view as floats needs an aligned one.
    return stored.clone(memory_format=torch.contiguous_format).view(stored_dtype(group.format))


def _steps(values: Tensor, group: Group) -> Tensor:
    """Return the scale of each row, float32 [n]; rows of zeros take the configured scale."""
    low, high = code_range(group.format)
    needed = torch.maximum(values.amax(dim=1) / high, values.amin(dim=1) / low)
    return torch.where(needed > 0, needed, torch.full_like(needed, group.scale))
