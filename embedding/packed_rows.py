"""Store the rows of one group in low precision, as `PlainRows` of `row_store.py` does in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.embedding.config import DynamicTableConfig, Group, key_of
from tessera.kernels.chunks import allocate_chunk
from tessera.kernels.formats import DTYPES, code_range, is_int, stored_dtype
from tessera.kernels.gather import gather
from tessera.kernels.packed import Hyper, packed_gather, packed_learn_steps, packed_look_ahead, packed_update
from tessera.kernels.quantise import quantise
from tessera.kernels.random import normal
from tessera.kernels.reference.random import stream
from tessera.kernels.scatter import scatter


class PackedRows:
    """Rows packed as `kernels/formats.py` describes.

    Random draws of rounding come from (seed, table, group, id, step of the table); a row's initial values take step 0.
    """

    def __init__(self, config: DynamicTableConfig, group: Group, device: torch.device) -> None:
        layout = config.layout(group)
        assert layout is not None, group
        self._config, self._group, self._layout, self._device = config, group, layout, device
        self._lots_key = key_of(f"{config.name}_{group.name}/rounding")
        self.chunks: list[Tensor] = []
        self.learned = layout.learned
        self.needs_ids = group.rounding == "stochastic" or layout.moments > 0

    def grow(self) -> None:
        """Reserve one more chunk."""
        shape = (self._config.chunk_rows, self._layout.bytes)
        self.chunks.append(allocate_chunk(shape, torch.uint8, self._device))

    def initialise(self, rows: Tensor, ids: Tensor, first: Tensor | None) -> None:
        """Set initial values and state, and the configured scale, or the one that reaches all values of `first`."""
        group, layout, config, n = self._group, self._layout, self._config, rows.numel()
        steps = torch.full((n,), group.step, device=self._device) if is_int(group.format) else None
        if first is None:
            values = normal(config.seed, config.key(group), ids, group.dim).mul_(group.init_std)
        else:
            values = first.expand(n, -1).contiguous()
            if steps is not None:
                low, high = code_range(group.format)
                steps = steps.maximum(first.max() / high).maximum(first.min() / low)
        stored = quantise(
            values, steps, group.format, rounding=group.rounding, ids=ids, seed=config.seed, table=self._lots_key
        )
        state = values.new_zeros((n, layout.state_floats + layout.moments + layout.step_state))
        state[:, : layout.state_floats] = config.optimizer.initial_accumulator
        self.write(rows, stored, state, steps)

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
        held: Tensor | None = None,
    ) -> None:
        """As `PlainRows.update`; held: float32 [u, dim], takes the new values instead of the rows."""
        packed_update(
            self.chunks,
            rows,
            grads,
            inverse,
            rows if ids is None else ids,
            self._layout,
            self._hyper(lr, self._config.optimizer.weight_decay),
            stream=stream(self._config.seed, self._lots_key, step),
            rounding=self._group.rounding,
            held=held,
        )

    def look_ahead(self, rows: Tensor, held: Tensor, inverse: Tensor | None) -> Tensor:
        """Return held values as rows would hold them by nearest rounding: float32 [u, dim] or, with inverse, [n,
        dim]."""
        return packed_look_ahead(self.chunks, rows, held, self._layout, inverse)

    def learn_steps(
        self, rows: Tensor, held: Tensor, grads: Tensor, inverse: Tensor | None, ids: Tensor | None, step: int
    ) -> None:
        """Apply one step to the scales by the gradients of what `look_ahead` gave; then the rows take the held
        values."""
        learned = self._group.learned
        assert learned is not None, self._group
        packed_learn_steps(
            self.chunks,
            rows,
            held,
            grads,
            inverse,
            rows if ids is None else ids,
            self._layout,
            # The kernel adds its decay to the scaled gradient; ours belongs to the gradient before it is scaled.
            self._hyper(learned.lr, learned.weight_decay * learned.gradient_scale),
            gradient_scale=learned.gradient_scale,
            stream=stream(self._config.seed, self._lots_key, step),
            rounding=self._group.rounding,
        )

    def _hyper(self, lr: float, weight_decay: float) -> Hyper:
        o = self._config.optimizer
        return lr, weight_decay, o.eps, o.beta1, o.beta2, o.beta, o.l1, o.l2

    def clear(self, rows: Tensor) -> None:
        scatter(self.chunks, rows, torch.zeros((1, self._layout.bytes), dtype=torch.uint8, device=self._device))

    def decode(self, bytes_nb: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values in storage form, state float32 [n, state] (that of the scale last), scales [n] or None."""
        layout = self._layout
        first = layout.step_floats + layout.step_state
        floats = bytes_nb[:, : 4 * (first + layout.state_floats)].contiguous().view(torch.float32)
        moments = bytes_nb[:, 4 * (first + layout.state_floats) : layout.codes_at].contiguous().view(torch.bfloat16)
        state = torch.cat([moments.float(), floats[:, first:], floats[:, layout.step_floats : first]], dim=1)
        stored = bytes_nb[:, layout.codes_at : layout.codes_at + layout.codes_bytes].contiguous()
        steps = floats[:, 0] if layout.step_floats else None
        return stored.view(stored_dtype(layout.format)), state, steps

    def write(self, rows: Tensor, values: Tensor, state: Tensor, steps: Tensor | None) -> None:
        layout, n = self._layout, rows.numel()
        bytes_nb = torch.zeros((n, layout.bytes), dtype=torch.uint8, device=self._device)
        moments, floats, step_state = state.split([layout.moments, layout.state_floats, layout.step_state], dim=1)
        parts = [step_state, floats, moments.to(DTYPES["bf16"]), values]
        if layout.step_floats:
            assert steps is not None, layout
            parts.insert(0, steps[:, None])
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
