"""Reach into any tower where it reads its fields: the vectors that were looked up, and those that numbers become.

A tower reads a field in several places: its vectors of each group of embeddings (those of dim 1 are the first-order
weights), and for a number the outputs of each of the modules that `Fields.embed_numeric` made for it. A vector field is
read where it comes in, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tessera.ctr.models.numeric import Raw
from tessera.ctr.models.sequences import row_of_events
from tessera.ctr.models.tower import Events, Fields, Tower, drawn_inputs, logits_of


class Change(Protocol):
    """What becomes of the vectors that a tower reads."""

    def __call__(self, site: str, first: int, vectors: Tensor, rows: Tensor | None) -> Tensor:
        """Return what the tower reads in their place.

        Args:
            site: the place in the tower, the same in every batch.
            first: the place of the first of these fields in `field_names`; the others follow it.
            vectors: [B, fields, dim], or [events, 1, dim] of a sequence.
            rows: int64 [events], the row of each event; None where each row has one vector.
        """


def numeric_modules(tower: Tower, fields: Fields, numeric_class: type | None) -> list[nn.Module]:
    """Return the modules of a tower that make vectors of all its numeric fields.

    None where a tower reads numbers as they are (`numeric=raw`), or a module sees a part of them; there a field's
    vector is its value, of dim 1.
    """
    if not fields.numeric or numeric_class is None or issubclass(numeric_class, Raw):
        return []
    found = [module for module in tower.modules() if isinstance(module, numeric_class)]
    seen: dict[nn.Module, set[int]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda one, inputs: seen.setdefault(one, set()).add(inputs[0].shape[1]))
        for module in found
    ]
    training = tower.training
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            logits_of(tower.eval(), *drawn_inputs(tower, fields, 4, length=1))
    finally:
        tower.train(training)
        for hook in hooks:
            hook.remove()
    whole = all(widths == {len(fields.numeric)} for widths in seen.values())
    return list(seen) if whole else []


class FieldVectors:
    """The places where a tower reads its fields. The order of fields is that of `field_names`."""

    def __init__(self, tower: Tower, fields: Fields, numeric_class: type | None) -> None:
        self._tower = tower
        self._numeric = numeric_modules(tower, fields, numeric_class)
        self._scalars, self._vectors = len(fields.numeric), dict(fields.vectors)
        self._count = (self._scalars + len(self._vectors), len(fields.ids))
        ids = [name for group in fields.sequences for name in group.ids]
        numbers = [name for group in fields.sequences for name in group.numbers]
        after = sum(self._count)
        self._events = {name: after + place for place, name in enumerate([*ids, *numbers])}

    def change(self, change: Change) -> Callable[[], None]:
        """Have the tower read what `change` returns, until the function that is returned is called."""

        def of_inputs(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            numeric, embeddings, *events = inputs
            if self._scalars and not self._numeric:
                values = change("values", 0, numeric[:, : self._scalars].unsqueeze(2), None).squeeze(2)
                numeric = torch.cat([values, numeric[:, self._scalars :]], 1) if self._vectors else values
            if self._vectors:
                numeric = self._of_vectors(change, numeric)
            found = {
                group: change(group, self._count[0], vectors, None) if vectors.shape[1] else vectors
                for group, vectors in embeddings.items()
            }
            changed = [{name: self._of_events(change, one) for name, one in part.items()} for part in events]
            return (numeric, found, *changed)

        def of_numeric(place: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            return lambda _, inputs, output: change(f"numeric {place}", 0, output, None)

        hooks = [self._tower.register_forward_pre_hook(of_inputs)]
        hooks += [module.register_forward_hook(of_numeric(at)) for at, module in enumerate(self._numeric)]

        def undo() -> None:
            for hook in hooks:
                hook.remove()

        return undo

    def _of_vectors(self, change: Change, numeric: Tensor) -> Tensor:
        """Change vector fields where they come in: what towers make of them is linear."""
        scalars, *parts = numeric.split([self._scalars, *self._vectors.values()], 1)
        changed = [
            change(f"vector {name}", self._scalars + place, part.unsqueeze(1), None).squeeze(1)
            for place, (name, part) in enumerate(zip(self._vectors, parts, strict=True))
        ]
        return torch.cat([scalars, *changed], 1)

    @contextmanager
    def changed(self, change: Change) -> Iterator[None]:
        """The same, inside of the context."""
        undo = self.change(change)
        try:
            yield
        finally:
            undo()

    def _of_events(self, change: Change, events: Events) -> Events:
        found = [*events.numbers.values(), *(one for of in events.embeddings.values() for one in of.values())]
        rows = row_of_events(events.offsets, found[0].shape[0])
        return replace(
            events,
            embeddings={
                group: {
                    name: change(f"{group}/{name}", self._events[name], one.unsqueeze(1), rows).squeeze(1)
                    for name, one in of.items()
                }
                for group, of in events.embeddings.items()
            },
            numbers={
                name: change(name, self._events[name], one[:, None, None], rows)[:, 0, 0]
                for name, one in events.numbers.items()
            },
        )


def per_field(values: Tensor, places: Sequence[int] | Tensor, first: int, count: int, rows: Tensor | None) -> Tensor:
    """Return the numbers by which vectors of a site are multiplied, [B, count, 1] or [events, 1, 1].

    values: [G] or [B, G]; places: of each field its column in values.
    """
    columns = torch.as_tensor(places[first : first + count], device=values.device)
    chosen = values.index_select(-1, columns)
    if values.dim() == 1:
        return chosen.view(1, count, 1)
    return (chosen if rows is None else chosen[rows]).unsqueeze(2)
