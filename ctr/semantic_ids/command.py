"""The subcommands of `tessera prepare` for semantic ids."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction
from dataclasses import fields
from pathlib import Path
from typing import Any

from tessera.ctr.data.convert.output import Writing
from tessera.ctr.semantic_ids.assign import write_semantic_ids
from tessera.ctr.semantic_ids.codebooks import Making
from tessera.ctr.semantic_ids.items import CODEBOOKS, REPORT
from tessera.ctr.semantic_ids.join import join_semantic_ids
from tessera.embedding.errors import ConfigError

ASSIGN, JOIN = "semantic-ids", "join-semantic-ids"
MAKING = {
    "levels": "codes of an item",
    "codes": "centroids of a level",
    "seed": "another seed, other codebooks",
    "normalise": "divide vectors by their length",
    "sample": "items that the codebooks are made of",
    "iterations": "of k-means, at most",
}


def add_kinds(kinds: _SubParsersAction[ArgumentParser], written: ArgumentParser) -> None:
    """Add both subcommands. written: the options of files to write."""
    assign = kinds.add_parser(ASSIGN, parents=[written], help="ids for items, by vectors of what they are about")
    assign.add_argument("--input", nargs="+", required=True, help="files, folders, patterns or URIs of parquet")
    assign.add_argument("--item", default="item", help="column of the items (default: %(default)s)")
    assign.add_argument("--vector", default="vector", help="column of their vectors, lists (default: %(default)s)")
    for field in fields(Making):
        shown = MAKING[field.name]
        if isinstance(field.default, bool):
            assign.add_argument(f"--{field.name}", action="store_const", const=True, help=shown)
        else:
            assign.add_argument(f"--{field.name}", type=int, help=f"{shown} (default: {field.default})")
    assign.add_argument("--codebooks", type=Path, metavar="FOLDER", help="an earlier output: ids of its codebooks")
    assign.add_argument("--collision-level", action="store_true", help="a last code, so that no two items share all")
    assign.add_argument("--threads", type=int, default=1, help="the ids do not depend on it")
    join = kinds.add_parser(JOIN, help="adds a column of semantic ids to a data set")
    join.add_argument("--input", required=True, help="folder, or another path to read, of the data set")
    join.add_argument("--semantic-ids", type=Path, required=True, help=f"an output of {ASSIGN}")
    join.add_argument("--item", required=True, help="column of the data set's items")
    join.add_argument("--name", default="sid", help="of the new column (default: %(default)s)")
    join.add_argument("--output", type=Path, help="folder to make")
    join.add_argument("--overwrite", action="store_true", help="replace a prepared data set of that name")


def prepare(options: Namespace, writing: Writing | None = None) -> str:
    """Do what was parsed; return what was done, for people. Raises a TesseraError for mistakes."""
    return _join(options) if options.kind == JOIN else _assign(options, writing)


def _assign(options: Namespace, writing: Writing | None) -> str:
    given: dict[str, Any] = {name: getattr(options, name) for name in MAKING if getattr(options, name) is not None}
    if options.codebooks is not None and given:
        raise ConfigError(f"--{min(given)}: found with --codebooks, expected one of them: codebooks have it already")
    if options.threads < 1:
        raise ConfigError(f"--threads: found {options.threads}, expected at least 1")
    report = write_semantic_ids(
        options.input,
        options.output,
        options.codebooks or Making(**given),
        item=options.item,
        vector=options.vector,
        collision_level=options.collision_level,
        threads=options.threads,
        writing=writing,
        overwrite=options.overwrite,
    )
    errors = ", ".join(f"{error:.2%}" for error in report["error"])
    buckets = ", ".join(f"{size}: {count:,}" for size, count in report["buckets"].items())
    return "\n".join(
        [
            f"{ASSIGN}: {report['items']:,} items, version {report['version']}: {options.output}/{CODEBOOKS}, {REPORT}",
            f"error left after each level: {errors} of the squares of the vectors",
            f"distinct prefixes of each level: {', '.join(f'{count:,}' for count in report['prefixes'])}",
            f"{report['unique']:.1%} distinct ids per item, {report['alone']:.1%} of the items alone with theirs, "
            f"at most {report['largest_bucket']:,} items with the same",
            f"ids by the items that share them: {buckets}"
            + ("; a collision level tells these apart" if report["collision_level"] else ""),
        ]
    )


def _join(options: Namespace) -> str:
    summary = join_semantic_ids(
        options.input,
        options.semantic_ids,
        options.output,
        item=options.item,
        name=options.name,
        overwrite=options.overwrite,
    )
    total = sum(summary["rows"].values())
    rows = ", ".join(f"{name} {count:,}" for name, count in summary["rows"].items())
    return f"{JOIN}: rows written: {rows}; {summary['without'] / max(1, total):.2%} of them without a semantic id"
