"""Which inputs of a model are one field of the ranking: what can only be kept or dropped together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.ctr.data.schema import Schema


@dataclass(frozen=True)
class FieldGroup:
    """Features that are ranked as one: those that share a table or are aligned, and a number with its indicator.

    features: of the schema, as `data.drop` names them. fields: their places among the `field_names` of the model.
    """

    features: tuple[str, ...]
    fields: tuple[int, ...]

    @property
    def name(self) -> str:
        return " + ".join(self.features)


def field_names(schema: Schema) -> list[str]:
    """Return all inputs of a model in one order: numbers, vectors, pooled ids, sequences of ids, those of numbers."""
    unpooled = [feature.name for group in schema.sequences.values() for feature in group]
    ids = [name for name in unpooled if name in schema.id_names]
    numbers = [*schema.scalar_names, *(feature.name for feature in schema.vectors)]
    return [*numbers, *schema.pooled_names, *ids, *(name for name in unpooled if name not in ids)]


def field_groups(schema: Schema) -> list[FieldGroup]:
    """Return the groups of a schema; each field is in one of them. Order: as the first feature stands in the model."""
    names = field_names(schema)
    owner = {name: name for name in names}
    indicators = {f"{f.name}_missing": f.name for f in [*schema.numeric, *schema.vectors] if f.indicator}
    owner |= indicators
    sets = [*schema.tables.values(), *([one.name for one in group] for group in schema.sequences.values())]
    for together in sets:
        _unite(owner, together)
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault(owner[name], []).append(place)
    return [
        FieldGroup(tuple(names[at] for at in places if names[at] not in indicators), tuple(places))
        for places in groups.values()
    ]


def places_of(groups: Sequence[FieldGroup]) -> Tensor:
    """Return the number of the group of each field, int64 [fields]."""
    places = torch.zeros(1 + max(at for group in groups for at in group.fields), dtype=torch.int64)
    for number, group in enumerate(groups):
        places[list(group.fields)] = number
    return places


def _unite(owner: dict[str, str], together: Sequence[str]) -> None:
    """Give all of these names, and those that are with one of them already, the owner of the first."""
    old = {owner[name] for name in together}
    for name, of in owner.items():
        if of in old:
            owner[name] = owner[together[0]]
