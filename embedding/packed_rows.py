"""Store the rows of one group in low precision, as `PlainRows` of `row_store.py` does in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.embedding.config import DynamicTableConfig, Group, key_of
from tessera.kernels.chunks import allocate_chunk
from tessera.kernels.formats import DTYPES, code_range, is_int, stored_dtype
from tessera.kernels.gather import gather
from tessera.kernels.packed import BatchRows, packed_fake_quantise, packed_gather, packed_learn_scales, packed_update
from tessera.kernels.quantise import quantise
from tessera.kernels.random import normal, stream
from tessera.kernels.scatter import scatter


class PackedRows:
    """Rows packed as `kernels/layout.py` describes.

    Random draws of rounding come from (seed, table, group, id, step of the table); a row's initial values take step 0.
    """

    def __init__(self, config: DynamicTableConfig, group: Group, device: torch.device) -> None:
        layout = config.layout(group)
        assert layout is not None, group
        self._config, self._group, self._layout, self._device = config, group, layout, device
        self._rounding_key = key_of(f"{config.name}_{group.name}/rounding")
        self.chunks: list[Tensor] = []
        self.learned = layout.learned > 0
        self.needs_ids = group.rounding == "stochastic" or layout.moments > 0

    def grow(self) -> None:
        """Reserve one more chunk."""
        shape = (self._config.chunk_rows, self._layout.bytes)
        self.chunks.append(allocate_chunk(shape, torch.uint8, self._device))

    def initialise(self, rows: Tensor, ids: Tensor, first: Tensor | None) -> None:
        """Set initial values and state, and the configured scale, or the one that reaches all values of `first`."""
        group, layout, config, n = self._group, self._layout, self._config, rows.numel()
        scales = torch.full((n,), group.scale, device=self._device) if is_int(group.format) else None
        if first is None:
            values = normal(config.seed, config.key(group), ids, group.dim).mul_(group.init_std)
        else:
            values = first.expand(n, -1).contiguous()
            if scales is not None:
                low, high = code_range(group.format)
                scales = scales.maximum(first.max() / high).maximum(first.min() / low)
        stored = quantise(values, scales, group.format, rounding=group.rounding, ids=ids, stream=self._stream(0))
        state = values.new_zeros((n, layout.state_floats + layout.moments + layout.scale_state))
        state[:, : layout.state_floats] = config.optimizer.initial_accumulator
        self.write(rows, stored, state, scales)

    def gather(self, rows: Tensor, inverse: Tensor | None) -> Tensor:
        return packed_gather(self.chunks, rows, self._layout, inverse)

    def update(
        self,
        rows: Tensor,
        grads: Tensor,
        inverse: Tensor | None,
        lr: float,
        ids: Tensor | None,
        step: int,
        kept: Tensor | None = None,
        held: Tensor | None = None,
    ) -> None:
        """Do the same as `PlainRows.update`; held: float32 [u, dim], takes the new values instead of the rows."""
        batch, settings = BatchRows(rows, rows if ids is None else ids, inverse), self._config.optimizer.settings(lr)
        packed_update(
            self.chunks, batch, grads, self._layout, settings, stream=self._stream(step), held=held, kept=kept
        )

    def fake_quantise(self, rows: Tensor, held: Tensor, inverse: Tensor | None) -> Tensor:
        """Return held values as rows would hold them by nearest rounding: float32 [u, dim] or, with inverse, [n,
        dim]."""
        return packed_fake_quantise(self.chunks, rows, held, self._layout, inverse)

    def learn_scales(
        self, rows: Tensor, held: Tensor, grads: Tensor, inverse: Tensor | None, ids: Tensor | None, step: int
    ) -> None:
        """Apply one step to the scales by the gradients of what `fake_quantise` gave; then the rows take the held
        values."""
        learned = self._group.learned
        assert learned is not None, self._group
        # The kernel adds its decay to the scaled gradient; ours belongs to the gradient before it is scaled.
        decay = learned.weight_decay * learned.gradient_scale
        settings = self._config.optimizer.settings(learned.lr)
        settings = settings._replace(weight_decay=decay, gradient_scale=learned.gradient_scale)
        batch = BatchRows(rows, rows if ids is None else ids, inverse)
        packed_learn_scales(self.chunks, batch, grads, self._layout, settings, stream=self._stream(step), held=held)

    def _stream(self, step: int) -> int:
        return stream(self._config.seed, self._rounding_key, step)

    def clear(self, rows: Tensor) -> None:
        scatter(self.chunks, rows, torch.zeros((1, self._layout.bytes), dtype=torch.uint8, device=self._device))

    def decode(self, bytes_nb: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values in storage form, state float32 [n, state] (that of the scale last), scales [n] or None."""
        layout = self._layout
        first = layout.scale_floats + layout.scale_state
        floats = bytes_nb[:, : layout.moments_at].contiguous().view(torch.float32)
        moments = bytes_nb[:, layout.moments_at : layout.values_at].contiguous().view(torch.bfloat16)
        state = torch.cat([moments.float(), floats[:, first:], floats[:, layout.scale_floats : first]], dim=1)
        stored = bytes_nb[:, layout.values_at : layout.values_at + layout.values_bytes].contiguous()
        scales = floats[:, 0] if layout.scale_floats else None
        return stored.view(stored_dtype(layout.format)), state, scales

    def write(self, rows: Tensor, values: Tensor, state: Tensor, scales: Tensor | None) -> None:
        layout, n = self._layout, rows.numel()
        bytes_nb = torch.zeros((n, layout.bytes), dtype=torch.uint8, device=self._device)
        moments, floats, scale_state = state.split([layout.moments, layout.state_floats, layout.scale_state], dim=1)
        parts = [scale_state, floats, moments.to(DTYPES["bf16"]), values]
        if layout.scale_floats:
            assert scales is not None, layout
            parts.insert(0, scales[:, None])
        at = 0
        for part in parts:
            part = part.contiguous().view(torch.uint8)
            bytes_nb[:, at : at + part.shape[1]] = part
            at += part.shape[1]
        scatter(self.chunks, rows, bytes_nb)

    def stored(self, rows: Tensor) -> Tensor:
        """Return rows as they lie in the chunks: uint8 [n, bytes of a row]."""
        return gather(self.chunks, rows, self._layout.bytes)

    def store(self, rows: Tensor, stored: Tensor) -> None:
        scatter(self.chunks, rows, stored)
