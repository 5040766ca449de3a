"""Expressions over columns: names, constants, operators and functions of `pyarrow.compute`, and nothing else.

    views > 0 and country != 'de'               greater(utf8_length(query), 3)         column('odd name') <= 1e3

The text is parsed as Python would, and only the nodes below are taken; nothing is ever run as code. Operators stand
for functions of Arrow: `a / b` for divide(a, b), `a and b` for and_kleene(a, b). Null follows Arrow's rules: a
comparison with null is null.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tessera.ctr.data.arrow_types import plain_type
from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.features import nearest
from tessera.ctr.data.files import one_line

OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.And: "and_kleene",
    ast.Or: "or_kleene",
    ast.Not: "invert",
    ast.USub: "negate",
}
LONGEST = 10_000  # characters
Values = Any  # pa.Array or pa.Scalar, of a package without types
Step = Callable[[Mapping[str, pa.Array]], Values]


@dataclass(frozen=True)
class Expression:
    """A parsed expression. columns: those that it names, each once; text: as it was written."""

    text: str
    columns: tuple[str, ...]
    _step: Step

    def of(self, arrays: Mapping[str, pa.Array]) -> Values:
        """Return its values [n] for columns of n rows each. Raises pa.ArrowException, TypeError."""
        return self._step(arrays)


def parse(text: str, where: str) -> Expression:
    """Parse an expression. where: the begin of a message, as the key. Raises SchemaError, one line."""
    try:
        if len(text) > LONGEST:
            raise ValueError(f"{len(text):,} characters, expected at most {LONGEST:,}")
        tree = ast.parse(text.strip(), mode="eval")
        names: dict[str, None] = {}
        step = _step_of(tree.body, names)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise SchemaError(f"{where} is {text!r:.200}: {what}") from None
    if not names:
        raise SchemaError(f"{where} is {text!r:.200}: it names no column")
    return Expression(text, tuple(names), step)


def _step_of(node: ast.expr, names: dict[str, None]) -> Step:
    """Return what computes a node; columns are added to `names`. Raises ValueError."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
        constant = pa.scalar(node.value)
        return lambda arrays: constant
    if isinstance(node, ast.Name):
        return _column(node.id, names)
    if isinstance(node, ast.Call):
        return _call(node, names)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return _function(OPERATORS[type(node.op)], [_step_of(node.operand, names)])
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        sides = [_step_of(node.left, names), _step_of(node.right, names)]
        return _function(OPERATORS[type(node.op)], sides)
    if isinstance(node, ast.BoolOp):
        step = _step_of(node.values[0], names)
        for value in node.values[1:]:
            step = _function(OPERATORS[type(node.op)], [step, _step_of(value, names)])
        return step
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPERATORS:
        sides = [_step_of(node.left, names), _step_of(node.comparators[0], names)]
        return _function(OPERATORS[type(node.ops[0])], sides)
    raise ValueError(
        f"{ast.unparse(node)!r:.60} is not known here, expected columns, constants, + - * / == != < <= > >=, and, or, "
        "not, and functions of pyarrow.compute"
    )


def _column(name: str, names: dict[str, None]) -> Step:
    names[name] = None
    return lambda arrays: arrays[name]


def _call(node: ast.Call, names: dict[str, None]) -> Step:
    if node.keywords or not isinstance(node.func, ast.Name):
        raise ValueError(f"{ast.unparse(node)!r:.60}: expected the name of a function, and values without names")
    name = node.func.id
    if name == "column":
        first = node.args[0] if len(node.args) == 1 else None
        if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
            raise ValueError("column: expected one name in quotes")
        return _column(first.value, names)
    name = name.removesuffix("_")  # and_, or_: what Python keeps for itself
    known = [one for one in pc.list_functions() if pc.get_function(one).kind == "scalar" and one != "random"]
    if name not in known:
        raise ValueError(
            f"{name!r} is no function of pyarrow.compute that takes rows one by one; {nearest(name, known)}"
        )
    arity = pc.get_function(name).arity
    if arity is not Ellipsis and len(node.args) != arity:
        raise ValueError(f"{name} takes {arity} values, found {len(node.args)}")
    return _function(name, [_step_of(one, names) for one in node.args])


def _function(name: str, steps: list[Step]) -> Step:
    function = pc.get_function(name)
    return lambda arrays: function.call([step(arrays) for step in steps])


def filter_of(text: str) -> Expression:
    """Parse `data.where`. Raises SchemaError."""
    return parse(text, "data.where")


def check_filter(where: Expression, path: str, arrow: pa.Schema) -> None:
    """Compare a filter with a file's columns. Raises SchemaError: a column is not there, or there is no truth value."""
    for name in where.columns:
        if len(arrow.get_all_field_indices(name)) != 1:
            hint = nearest(name, arrow.names)
            raise SchemaError(f"{path}: column {name!r} (read by data.where) found nowhere; {hint}")
    what = f"{path}: data.where is {where.text!r:.200}"
    stored = {name: plain_type(arrow.field(name).type) for name in where.columns}
    kinds = {n: one.value_type if pa.types.is_dictionary(one) else one for n, one in stored.items()}
    try:
        found = where.of({name: pa.array([], kind) for name, kind in kinds.items()}).type
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise SchemaError(f"{what}: {one_line(error)[:200]}") from None
    if not pa.types.is_boolean(found):
        raise SchemaError(f"{what}: found {found}, expected true or false of each row")
