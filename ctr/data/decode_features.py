"""Decode the features of a row: numbers, ids, bags, and crosses of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from tessera.ctr.data import single_values, vectors
from tessera.ctr.data.bags import Bags, decode_bags, is_bag
from tessera.ctr.data.columns import Arrays, finder
from tessera.ctr.data.crosses import crossed
from tessera.ctr.data.decode_rows import Chunk
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.expressions import computed
from tessera.ctr.data.files import one_line
from tessera.ctr.data.schema import Feature


def decode_numeric(chunk: Chunk, arrays: Arrays, row: int, feature: Feature) -> None:
    """Decode one numeric feature, and its indicator into the row behind it."""
    decoded = single_values.numeric(feature, arrays)
    if decoded.bad is not None:
        expected = single_values.expected_number(feature)
        chunk.mark(decoded.bad, "numeric", feature.column, expected, finder(decoded.stored))
    chunk.deliver(decoded.values, "numeric", row)
    if feature.indicator:
        chunk.deliver(decoded.absent(), "numeric", row + 1)


def of_expression(step: Callable[..., None], feature: Feature) -> Callable[..., None]:
    """Return what computes the column that a decoding step takes. step: of a chunk and that column."""
    expression = feature.expression
    assert expression is not None

    def decode(chunk: Chunk, *arrays: Arrays) -> None:
        try:
            step(chunk, [computed(expression, arrays)] if all(arrays) else [])
        except (pa.ArrowException, TypeError) as error:
            where = f"{chunk.where(0)} and behind it: feature {feature.name!r}: {expression.text}"
            raise DataError(f"{where}: {one_line(error)}") from None

    return decode


def decode_vector(chunk: Chunk, arrays: Arrays, row: int, feature: Feature, indicator: int | None) -> None:
    """Decode a vector into the rows from `row` on, and its indicator into another one."""
    if not arrays:
        return
    decoded = vectors.vectors(feature, arrays)
    if decoded.bad is not None:
        chunk.mark(decoded.bad, "numeric", feature.column, vectors.expected(feature), decoded.found)
    chunk.deliver_vectors(decoded.values, row)
    if indicator is not None:
        chunk.deliver(decoded.absent(), "numeric", indicator)


def decode_single(chunk: Chunk, arrays: Arrays, row: int, feature: Feature) -> None:
    """Decode one id per row; `present` is False where it is null."""
    decoded = _decoded_single(chunk, arrays, feature)
    if feature.name in chunk.decoder.crossed:
        chunk.members[feature.name] = decoded
    _deliver_single(chunk, decoded, row)


def _decoded_single(chunk: Chunk, arrays: Arrays, feature: Feature) -> single_values.Singles:
    decoded = single_values.single(feature, arrays)
    if decoded.bad is not None:
        reason = "numeric" if feature.kind == "numeric" else "id"
        chunk.mark(decoded.bad, reason, feature.column, single_values.expected_id(feature), decoded.found)
    return decoded


def _deliver_single(chunk: Chunk, decoded: single_values.Singles, row: int) -> None:
    if decoded.there is not None:
        for _, _, _, delivery in chunk.windows:
            if delivery.present is None:
                delivery.present = np.ones(delivery.ids.shape, bool)
        chunk.deliver(decoded.there, "present", row)
    chunk.deliver(decoded.values, "ids", row)


def _always(found: object) -> Callable[[int], object]:
    return lambda row: found


def decode_bags_of(chunk: Chunk, arrays: tuple[Arrays, ...], i: int, feature: Feature) -> None:
    if not arrays[0]:
        return
    bags = _decoded_bags(chunk, arrays, feature)
    if feature.name in chunk.decoder.crossed:
        chunk.members[feature.name] = bags
    chunk.deliver_bags(i, bags)


def _decoded_bags(chunk: Chunk, arrays: tuple[Arrays, ...], feature: Feature) -> Bags:
    bags, problems = decode_bags(feature, arrays[0], arrays[1] if feature.weights else None)
    for problem in problems:
        reason = "item_weight" if problem.column == feature.weights else "id"
        chunk.mark(problem.rows, reason, problem.column, problem.expected, _always(problem.found))
    return bags


def decode_only_crossed(chunk: Chunk, arrays: Arrays, feature: Feature) -> None:
    """Decode a feature that the model does not read, for the crosses that it is in."""
    if not is_bag(feature):
        chunk.members[feature.name] = _decoded_single(chunk, arrays, feature)
    elif arrays:
        chunk.members[feature.name] = _decoded_bags(chunk, (arrays,), feature)


def decode_cross(chunk: Chunk, place: int, feature: Feature) -> None:
    """Cross two decoded features; place: of the cross among the single ids, or among the bags."""
    if not all(member.name in chunk.members for member in feature.members):  # there are no rows
        return
    found = crossed(feature, [chunk.members[member.name] for member in feature.members])
    if isinstance(found, Bags):
        chunk.deliver_bags(place, found)
    else:
        _deliver_single(chunk, found, place)
