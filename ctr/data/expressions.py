"""Expressions over columns: names, constants, operators and functions of `pyarrow.compute`, and nothing else.

    views > 0 and country != 'de'     log1p(price / quantity)     hour(time)     column('odd name') <= 1e3

The text is parsed as Python would, and only the nodes below are taken; nothing is ever run as code. Operators stand
for functions of Arrow, `a and b` for and_kleene(a, b); `a / b` divides as numbers with a point. Null follows Arrow's
rules: null in, null out.

Columns come as the few types that mean the same wherever they were written: integers of 64 bits, floats of 64 bits,
strings, truth values, and times in UTC without a zone. So a row of a file, of a data frame and of JSON give one result.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from tessera.ctr.data.arrow_types import plain, plain_type
from tessera.ctr.data.errors import SchemaError, nearest
from tessera.ctr.data.files import one_line

QUOTIENT, WHOLE = "/", "integer"  # what is no function of Arrow alone
OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: QUOTIENT,
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


TIMES = {
    "hour",
    "minute",
    "second",
    "day",
    "day_of_week",
    "day_of_year",
    "month",
    "quarter",
    "year",
    "week",
    "is_leap_year",
}
TIMES |= {"iso_week", "iso_year", "us_week", "us_year", "millisecond", "microsecond", "nanosecond", "is_dst"}
OF_TEXT = ("utf8_", "ascii_", "binary_", "string_is_", "match_", "find_", "starts_with", "ends_with", "count_substring")


@dataclass(frozen=True)
class Expression:
    """A parsed expression. columns: those that it names, each once; text: as it was written; tree: as it was parsed."""

    text: str
    columns: tuple[str, ...]
    tree: ast.expr
    _step: Step

    def of(self, arrays: Mapping[str, pa.Array]) -> Values:
        """Return its values [n] for columns of n rows each, of any type that a file gives them.

        Raises pa.ArrowException, TypeError.
        """
        kinds = self.kinds
        return self._step({name: normal(arrays[name], kinds[name]) for name in self.columns})

    def type_of(self, stored: Mapping[str, pa.DataType]) -> pa.DataType:
        """Return the type of its values. stored: of its columns. Raises pa.ArrowException, TypeError."""
        return self.of({name: pa.array([], stored[name]) for name in self.columns}).type

    @cached_property
    def kinds(self) -> dict[str, pa.DataType]:
        """What each column holds, by what is done to it: times, text, or else numbers. Nulls alone are nulls of that,
        and text where times are expected is read as ISO 8601."""
        found: dict[str, pa.DataType] = dict.fromkeys(self.columns, pa.float64())
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                name, sides = node.func.id, node.args
            elif isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                name = OF_TEXT[0] if any(map(_is_text, sides)) else ""
            else:
                continue
            if name in TIMES or name.startswith(OF_TEXT):
                for column in filter(None, map(column_of, sides)):
                    found[column] = TIME if name in TIMES else pa.string()
        return found


TIME = pa.timestamp("us")


def normal(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return an array as the type that all of its meaning have. kind: of nulls alone. Raises pa.ArrowException."""
    array = plain(array)
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    stored = array.type
    if types.is_null(stored):
        return pa.nulls(len(array), kind)
    if types.is_uint64(stored):
        return array.view(pa.int64())  # ids keep their bits
    if types.is_integer(stored):
        return array.cast(pa.int64())
    if types.is_floating(stored) or types.is_decimal(stored):
        return array.cast(pa.float64())
    if types.is_date(stored) or types.is_timestamp(stored):
        return array.cast(pa.timestamp("us"), safe=False)  # in UTC; finer than microseconds is cut off
    if types.is_large_string(stored) or types.is_binary(stored) or types.is_large_binary(stored):
        array = array.cast(pa.string())
    if kind == TIME and types.is_string(array.type):
        try:
            return array.cast(TIME)
        except pa.ArrowInvalid:  # with a zone
            return array.cast(pa.timestamp("us", "UTC")).cast(TIME)
    return array


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def column_of(node: ast.expr) -> str | None:
    """Return the column that a node is, None if it is something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column":
        return str(node.args[0].value) if isinstance(node.args[0], ast.Constant) else None
    return None


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
    return Expression(text, tuple(names), tree.body, step)


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
    if name == WHOLE:
        if len(node.args) != 1:
            raise ValueError(f"{WHOLE} takes 1 value, found {len(node.args)}")
        return _whole(_step_of(node.args[0], names))
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
    if name == QUOTIENT:
        return lambda arrays: pc.divide(*(step(arrays).cast(pa.float64()) for step in steps))
    function = pc.get_function(name)
    return lambda arrays: function.call([step(arrays) for step in steps])


def _whole(step: Step) -> Step:
    """Return what rounds numbers down to integers; what is not finite has none."""

    def rounded(arrays: Mapping[str, pa.Array]) -> Values:
        values = pc.floor(step(arrays).cast(pa.float64()))
        there = pc.less_equal(pc.abs(values), 2.0**62)  # false of NaN
        return pc.if_else(there, values, pa.scalar(None, pa.float64())).cast(pa.int64())

    return rounded


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
    try:
        found = where.type_of(stored_types(where, arrow))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise SchemaError(f"{what}: {one_line(error)[:200]}") from None
    if not pa.types.is_boolean(found):
        raise SchemaError(f"{what}: found {found}, expected true or false of each row")


def stored_types(expression: Expression, arrow: pa.Schema) -> dict[str, pa.DataType]:
    """Return the plain types of an expression's columns."""
    stored = {name: plain_type(arrow.field(name).type) for name in expression.columns}
    return {name: one.value_type if types.is_dictionary(one) else one for name, one in stored.items()}


def computed(expression: Expression, arrays: Sequence[Sequence[pa.Array]]) -> pa.Array:
    """Return the values [n] of an expression. arrays: of each of its columns, one after the other.

    Raises pa.ArrowException, TypeError: a value that cannot be computed.
    """
    found = expression.of(dict(zip(expression.columns, map(together, arrays), strict=True)))
    rows = sum(len(array) for array in arrays[0])
    return found if isinstance(found, pa.Array) else pa.repeat(found, rows)


def together(arrays: Sequence[pa.Array]) -> pa.Array:
    """Return a column as one array, of the widest of the types that files give it."""
    plain = [array.dictionary_decode() if types.is_dictionary(array.type) else array for array in arrays]
    if all(array.type == plain[0].type for array in plain):
        return pa.concat_arrays(plain)
    tables = [pa.table({"column": array}) for array in plain]
    return pa.concat_tables(tables, promote_options="permissive")["column"].combine_chunks()
