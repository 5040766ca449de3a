"""What rows hold: for every group of columns the values and, behind them, the optimizer's state.

Each group has its own chunks float32 [chunk_rows, dim + state], under row numbers that all groups share: the update
kernel wants values and state of a group side by side from column 0 of contiguous chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedding.config import DynamicTableConfig
from kernels.chunks import allocate_chunk
from kernels.gather import gather
from kernels.initialise import init_rows
from kernels.scatter import scatter
from kernels.update import state_width, update


class RowStore:
    def __init__(self, config: DynamicTableConfig, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._optimizer = config.optimizer
        self._seed = config.seed
        self._chunk_rows = config.chunk_rows
        self._stds = [group.init_std for group in config.groups]
        self._keys = [config.key(group) for group in config.groups]
        self._dims = [group.dim for group in config.groups]
        self._state_widths = [state_width(config.optimizer.name, group.dim) for group in config.groups]
        self._groups: list[list[Tensor]] = [[] for _ in config.groups]

    @property
    def bytes_per_row(self) -> int:
        return 4 * (sum(self._dims) + sum(self._state_widths))

    def reserve(self, end: int) -> None:
        """Have memory for rows [0, end). A new chunk is not touched before its rows are."""
        while len(self._groups[0]) * self._chunk_rows < end:
            for chunks, dim, state in zip(self._groups, self._dims, self._state_widths, strict=True):
                chunks.append(allocate_chunk((self._chunk_rows, dim + state), torch.float32, self.device))

    def initialise(self, rows: Tensor, ids: Tensor) -> None:
        """First values, from (seed, table, group, id) alone, and first state."""
        for chunks, dim, std, key in zip(self._groups, self._dims, self._stds, self._keys, strict=True):
            init_rows(
                chunks,
                rows,
                ids,
                dim,
                distribution="normal",
                offset=0.0,
                scale=std,
                seed=self._seed,
                table=key,
                state=self._optimizer.initial_accumulator,
            )

    def gather(self, rows: Tensor, inverse: Tensor | None = None) -> Tensor:
        """float32 [u, width], or [n, width] with inverse int64 [n]; row -1 gives zeros."""
        parts = [gather(chunks, rows, dim, inverse) for chunks, dim in zip(self._groups, self._dims, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def update(self, rows: Tensor, grads: Tensor, inverse: Tensor | None, lr: float | None) -> None:
        """One optimizer step on rows (distinct, -1 skipped); grads float32 [n, width]."""
        optimizer = self._optimizer
        parts = [grads] if len(self._dims) == 1 else grads.split(self._dims, dim=1)
        for chunks, part in zip(self._groups, parts, strict=True):
            update(
                optimizer.name,
                chunks,
                rows,
                part,
                inverse,
                learning_rate=optimizer.lr if lr is None else lr,
                weight_decay=optimizer.weight_decay,
                eps=optimizer.eps,
                beta1=optimizer.beta1,
                beta2=optimizer.beta2,
                beta=optimizer.beta,
                l1=optimizer.l1,
                l2=optimizer.l2,
            )

    def clear(self, rows: Tensor) -> None:
        """Set values and state to zero."""
        for chunks, dim, state in zip(self._groups, self._dims, self._state_widths, strict=True):
            scatter(chunks, rows, torch.zeros((1, dim + state), device=self.device))

    def read_state(self, rows: Tensor) -> Tensor:
        """float32 [n, state_width]: the state of one group after the other."""
        parts = [rows.new_empty((rows.numel(), 0), dtype=torch.float32)]
        for chunks, dim, state in zip(self._groups, self._dims, self._state_widths, strict=True):
            if state:
                parts.append(gather(chunks, rows, state, begin=dim))
        return torch.cat(parts, dim=1)

    def write(self, rows: Tensor, values: Tensor, state: Tensor) -> None:
        """Overwrite rows with values [n, width] and state [n, state_width]."""
        values_of = values.split(self._dims, dim=1)
        state_of = state.split(self._state_widths, dim=1)
        for chunks, value, more in zip(self._groups, values_of, state_of, strict=True):
            scatter(chunks, rows, torch.cat([value, more], dim=1))
