"""Find row groups of which no row passes a filter, by the statistics in the footer: they are not read.

Only what is certain counts: columns beside constants, `is_null` and `is_valid`, joined by `and` and `or`. Anything else
may be true. A comparison with null or NaN is not true, so the smallest and largest values decide.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow.parquet as pq

from tessera.ctr.data.expressions import Expression, column_of

EXACT = 2**53  # integers up to this are compared as floats without rounding
Bounds = tuple[Any, Any]
# Whether x op constant is false of all x between two bounds.
NEVER: dict[type[ast.cmpop], Callable[[Bounds, Any], bool]] = {
    ast.Lt: lambda bounds, constant: bounds[0] >= constant,
    ast.LtE: lambda bounds, constant: bounds[0] > constant,
    ast.Gt: lambda bounds, constant: bounds[1] <= constant,
    ast.GtE: lambda bounds, constant: bounds[1] < constant,
    ast.Eq: lambda bounds, constant: constant < bounds[0] or bounds[1] < constant,
}
TURNED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE, ast.Eq: ast.Eq}


def is_outside(where: Expression, group: pq.RowGroupMetaData) -> bool:
    """Return whether a row group holds no row of which a filter is true, as far as its statistics say."""
    found: dict[str, pq.Statistics] = {}
    for place in range(group.num_columns):
        column = group.column(place)
        if column.path_in_schema in where.columns and column.statistics is not None:
            found[column.path_in_schema] = column.statistics
    return _never(where.tree, found, group.num_rows)


def _never(node: ast.expr, statistics: Mapping[str, pq.Statistics], rows: int) -> bool:
    if isinstance(node, ast.BoolOp):
        each = (_never(one, statistics, rows) for one in node.values)
        return any(each) if isinstance(node.op, ast.And) else all(each)
    if isinstance(node, ast.Compare):
        return _never_so(node.left, type(node.ops[0]), node.comparators[0], statistics, rows)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
        of = statistics.get(column_of(node.args[0]) or "")
        if of is not None and of.has_null_count and node.func.id in ("is_null", "is_valid"):
            return of.null_count == (0 if node.func.id == "is_null" else rows)
    return False


def _never_so(
    left: ast.expr, op: type[ast.cmpop], right: ast.expr, statistics: Mapping[str, pq.Statistics], rows: int
) -> bool:
    if column_of(left) is None:
        left, op, right = right, TURNED.get(op, op), left
    of = statistics.get(column_of(left) or "")
    constant = _constant(right)
    if of is None or constant is None or op not in NEVER:
        return False
    if of.has_null_count and of.null_count == rows:
        return True
    if not of.has_min_max:
        return False
    bounds = of.min, of.max
    return all(_comparable(one, constant) for one in bounds) and NEVER[op](bounds, constant)


def _constant(node: ast.expr) -> Any:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _constant(node.operand)
        return -value if isinstance(value, int | float) else None
    return node.value if isinstance(node, ast.Constant) else None


def _comparable(bound: Any, constant: Any) -> bool:
    """Return whether Python orders two values as Arrow does."""
    if isinstance(bound, str) and isinstance(constant, str):
        return True
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (bound, constant))
    return numbers and all(
        abs(one) <= EXACT or (isinstance(one, float) and math.isinf(one)) for one in (bound, constant)
    )
