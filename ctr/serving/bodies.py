"""Read requests and write answers, as JSON or Arrow. Whatever a body holds ends in rows, or in one line and a status of
4xx."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from tessera.ctr.serving.batches import Answer, Limits, Request
from tessera.ctr.serving.plain_bytes import plain_bytes

ARROW = "application/vnd.apache.arrow.stream"
JSON = "application/json"
#: Begins of zstd and lz4 frames, which stand behind the size of what they decompress to.
COMPRESSED = re.compile(rb"\x28\xb5\x2f\xfd|\x04\x22\x4d\x18")
LARGEST_FACTOR = 8  # by which an Arrow body may grow when it is decompressed or decoded


class BadRequest(Exception):
    """A request that cannot be answered; the message is one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def request_of(kind: str, body: bytes, limits: Limits, *, ranked: bool) -> Request:
    """Return what a body asks for. kind: its content type. ranked: one user and candidates.

    Raises BadRequest.
    """
    kind = kind.partition(";")[0].strip().lower()
    if kind == ARROW and not ranked:
        table = _arrow(body, limits)
        return Request(table, _counted(table.num_rows, limits))
    if kind not in (JSON, ""):
        expected = JSON if ranked else f"{JSON} or {ARROW}"
        raise BadRequest(415, f"content type {kind[:80]!r}; expected {expected}")
    found = json_of(body)
    keys = ("user", "candidates") if ranked else ("rows",)
    if not isinstance(found, Mapping) or set(found) != set(keys):
        raise BadRequest(400, f"expected an object with {' and '.join(keys)}")
    rows = found[keys[-1]]
    if not isinstance(rows, list):
        raise BadRequest(400, f"{keys[-1]}: expected a list of objects")
    user = found["user"] if ranked else None
    if ranked and not isinstance(user, Mapping):
        raise BadRequest(400, "user: expected an object")
    return Request(rows, _counted(len(rows), limits), user)


def labels_of_body(found: Any, most: int) -> list[tuple[str, int]]:
    """Return keys and labels of a body. most: labels of a request. Raises BadRequest."""
    if not isinstance(found, Mapping) or set(found) != {"labels"} or not isinstance(found["labels"], list):
        raise BadRequest(400, 'expected an object with labels, a list of {"key": ..., "label": 0 or 1}')
    if len(found["labels"]) > most:
        raise BadRequest(413, f"{len(found['labels']):,} labels; expected at most {most:,}")
    labels = []
    for number, one in enumerate(found["labels"]):
        if not isinstance(one, Mapping) or set(one) != {"key", "label"} or not isinstance(one["key"], str):
            raise BadRequest(422, f"label {number}: expected an object with key, a text, and label")
        if isinstance(one["label"], bool) or one["label"] not in (0, 1):
            raise BadRequest(422, f"label {number}: found {str(one['label'])[:40]}, expected 0 or 1")
        labels.append((one["key"], int(one["label"])))
    return labels


def _counted(rows: int, limits: Limits) -> int:
    if rows > limits.rows:
        raise BadRequest(413, f"{rows:,} rows; expected at most {limits.rows:,}")
    return rows


def json_of(body: bytes) -> Any:
    """Return what a body holds. Raises BadRequest: it is no JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"the body is no JSON: {' '.join(str(error).split())[:120]}") from None


def _arrow(body: bytes, limits: Limits) -> pa.Table:
    grown = sum(
        max(0, int.from_bytes(body[at - 8 : at], "little", signed=True))
        for at in (match.start() for match in COMPRESSED.finditer(body))
        if at >= 8
    )
    if grown > LARGEST_FACTOR * limits.body_bytes:
        raise BadRequest(413, "the body decompresses to more than is allowed")
    try:
        with pa.ipc.open_stream(body) as stream:
            table = stream.read_all()
        table.validate()
        grown = sum(plain_bytes(chunk) for column in table.columns for chunk in column.chunks)
        if grown > LARGEST_FACTOR * limits.body_bytes:
            raise BadRequest(413, "the body's dictionaries and views stand for more than is allowed")
        table.validate(full=True)  # offsets that lead elsewhere would be followed
        return table
    except (pa.ArrowException, OSError, ValueError, IndexError, MemoryError) as error:
        raise BadRequest(400, f"the body is no Arrow stream: {' '.join(str(error).split())[:120]}") from None


def content_of(answer: Answer, labels: list[str], accepted: str) -> tuple[bytes, str]:
    """Return the content of an answer and its type: JSON, or Arrow where the client accepts that alone."""
    if accepted.partition(";")[0].strip().lower() == ARROW:
        columns = answer.scores.reshape(len(answer.scores), -1).T
        table = pa.table([pa.array(np.ascontiguousarray(column)) for column in columns], names=labels)
        if answer.keys is not None:
            table = table.append_column("key", pa.array(answer.keys, pa.string()))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.with_metadata({"version": answer.version})) as stream:
            stream.write_table(table)
        return sink.getvalue().to_pybytes(), ARROW
    said: dict[str, Any] = {"version": answer.version, "labels": labels, "scores": answer.scores.tolist()}
    if answer.keys is not None:
        said["keys"] = answer.keys
    return json.dumps(said).encode(), JSON
