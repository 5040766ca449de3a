"""Run `scripts/prepare.py`: build a converter from an argparse namespace, call it, and return a one-line summary."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path

from tessera.ctr.data.convert.avazu import convert_avazu
from tessera.ctr.data.convert.criteo import convert_criteo, one_day_per_file
from tessera.ctr.data.convert.csv import convert_csv
from tessera.ctr.data.convert.histories import HistoryRule
from tessera.ctr.data.convert.logs import convert_log
from tessera.ctr.data.convert.movielens import convert_movielens
from tessera.ctr.data.convert.output import COMPRESSIONS, Writing
from tessera.ctr.data.convert.pipeline import Input, Options
from tessera.ctr.data.convert.split import seconds_of
from tessera.ctr.data.synthetic import row_group_rows_of, write_synthetic
from tessera.ctr.data.synthetic_funnel import FunnelConfig, write_funnel
from tessera.ctr.data.synthetic_histories import HistoriesConfig, write_histories
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.semantic_ids import command as semantic_ids
from tessera.embedding.errors import ConfigError

# Option of `synthetic` -> help; type and default are those of the field of SyntheticConfig.
SYNTHETIC = {
    "rows": "of all splits or days together",
    "days": "0: train, valid and test; otherwise so many folders day=YYYY-MM-DD",
    "start_date": "the first day",
    "seed": "another seed, another data set",
    "valid": "fraction of the rows, without days",
    "test": "fraction of the rows, without days",
    "new_ids": "share of the large columns' ids replaced every day",
    "drift": "angle in radians by which the truth's weights turn every day",
    "zipf": "exponent of the ids' distribution",
    "vocabulary": "factor on the large vocabularies",
    "base_rate": "mean probability of a click",
    "signal": "standard deviation of the true logit",
}

HISTORIES = {name: SYNTHETIC[name] for name in ("rows", "days", "start_date", "seed", "valid", "test")} | {
    "length": "of the longest history",
    "recent": "newest events that the label depends on",
    "categories": "of items",
    "items": "of a category",
    "users": "of the log",
    "signal": "what a recent event of the item's category adds to the true logit",
}
FUNNEL = {name: SYNTHETIC[name] for name in ("rows", "days", "start_date", "seed", "valid", "test")} | {
    "users": "of the log",
    "items": "of the log",
    "click_rate": "mean probability of a click",
    "buy_rate": "mean probability of a purchase after a click, over all rows",
    "signal": "standard deviation of both true logits, about",
    "shared": "correlation of what ids do to clicks and to purchases",
}


def add_kinds(parser: ArgumentParser) -> None:
    """Add one subcommand per kind of input."""
    files, split, text, written = _shared_options()
    history = _history_options()
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    criteo = kinds.add_parser("criteo", parents=[files, split, text, written], help="Criteo's tab separated logs")
    criteo.add_argument("--first-day", help="each --input file is one day, the first of this date (Terabyte log)")
    kinds.add_parser("avazu", parents=[files, split, text, written], help="Avazu's click log")
    movielens = kinds.add_parser(
        "movielens", parents=[split, text, written, history], help="GroupLens or RecBole files"
    )
    movielens.add_argument("--input", type=Path, required=True, help="folder of the files")
    movielens.add_argument("--threshold", type=float, default=3.0, help="above: 1, below: 0, equal: dropped")
    log = kinds.add_parser("parquet", parents=[written, history], help="any log in parquet: gives its rows histories")
    log.add_argument("--input", type=Path, nargs="+", required=True, help="files, or folders of them")
    log.add_argument("--time", required=True, help="column of the events' times")
    log.add_argument("--time-unit", choices=("s", "ms", "us", "ns"), default="s", help="of integer times")
    log.add_argument("--label", nargs="+", default=["label"], help="columns of labels, where no schema.yaml is there")
    log.add_argument("--split", choices=("time", "day", "kept"), default="time", help="kept: the folders of the input")
    log.add_argument("--valid-fraction", type=float, default=Input.valid)
    log.add_argument("--test-fraction", type=float, default=Input.test)
    csv = kinds.add_parser("csv", parents=[text, written], help="any delimited text, described by a yaml")
    csv.add_argument("--config", type=Path, required=True, help="the yaml")
    histories = kinds.add_parser("synthetic-histories", parents=[written], help="labels that depend on recent events")
    for field in fields(HistoriesConfig):
        option, default = f"--{field.name.replace('_', '-')}", field.default
        histories.add_argument(option, type=type(default), default=default, help=HISTORIES[field.name])
    funnel = kinds.add_parser("synthetic-funnel", parents=[written], help="clicks, and purchases after clicks")
    for field in fields(FunnelConfig):
        option, default = f"--{field.name.replace('_', '-')}", field.default
        funnel.add_argument(option, type=type(default), default=default, help=FUNNEL[field.name])
    synthetic = kinds.add_parser("synthetic", parents=[written], help="Criteo-shaped, with a known ceiling")
    for field in fields(SyntheticConfig):
        if field.name in SYNTHETIC:
            shown = f"{SYNTHETIC[field.name]} (default: {field.default})"
            option = f"--{field.name.replace('_', '-')}"
            synthetic.add_argument(option, type=type(field.default), default=field.default, help=shown)
    stats = kinds.add_parser("stats", help="statistics of a data set, as a page and as the file of data.statistics")
    stats.add_argument("data", nargs="+", metavar="DATA", help="folders, files, patterns or URIs of parquet")
    stats.add_argument("--against", nargs="+", help="another set, from which drift is measured: an earlier day")
    stats.add_argument(
        "--vocabulary",
        nargs="*",
        metavar="COLUMN",
        help="also count every value of these columns, for embedding.admission.kind=vocabulary; none named: of all ids",
    )
    stats.add_argument("--min-count", type=int, default=2, help="least occurrences of a value of a vocabulary")
    stats.add_argument("--output", type=Path, help="folder to make")
    stats.add_argument("--overwrite", action="store_true", help="replace statistics of an earlier call")
    semantic_ids.add_kinds(kinds, written)
    synthetic.add_argument("--string-ids", action="store_true", help="ids as 16 hexadecimal digits")
    synthetic.add_argument("--threads", type=int, default=1, help="the files do not depend on it")


def _shared_options() -> tuple[ArgumentParser, ArgumentParser, ArgumentParser, ArgumentParser]:
    files, split, text, written = (ArgumentParser(add_help=False) for _ in range(4))
    files.add_argument("--input", type=Path, nargs="+", help="files to split; .gz .bz2 .zst .lz4 are unpacked")
    for name in ("train", "valid", "test"):
        files.add_argument(f"--{name}", type=Path, nargs="+", help=f"files that are the {name} split")
    for name in ("valid", "test"):
        files.add_argument(f"--{name}-from", help="with --split time: seconds since 1970 or a date")
    split.add_argument("--split", choices=("random", "time", "day"), default="random", help="of the --input")
    split.add_argument("--valid-fraction", type=float, default=Input.valid)
    split.add_argument("--test-fraction", type=float, default=Input.test)
    split.add_argument("--seed", type=int, default=Input.seed, help="of the random split")
    text.add_argument("--bad-rows", choices=("raise", "skip"), default="raise", help="skip: leave out and count")
    text.add_argument("--block-bytes", type=int, default=Options.block_bytes, help="text parsed at a time")
    written.add_argument("--output", type=Path, help="folder to make")
    written.add_argument("--overwrite", action="store_true", help="replace a prepared data set of that name")
    written.add_argument("--row-group-rows", type=int, help="rows decoded at a time (default: 16384 or fewer)")
    written.add_argument("--rows-per-file", type=int, default=Writing.rows_per_file)
    written.add_argument("--compression", choices=COMPRESSIONS, default=Writing.compression)
    return files, split, text, written


def _history_options() -> ArgumentParser:
    history = ArgumentParser(add_help=False)
    history.add_argument("--history", nargs="+", metavar="COLUMN", default=[], help="what rows keep of earlier events")
    history.add_argument("--by", help="column whose rows of one value are one history: the user")
    history.add_argument("--length", type=int, default=50, help="events in a history at most, the newest")
    history.add_argument("--events-where", metavar="COLUMN", help="only rows with 1 in it become events; default: all")
    history.add_argument("--memory-mb", type=int, default=1024, help="about what grouping by user may take")
    return history


def prepare(options: Namespace) -> str:
    """Do what a parser with `add_kinds` parsed; returns what was done, for people. Raises a TesseraError for
    mistakes."""
    if options.output is None and options.kind != "csv":
        raise ConfigError("--output: found none, expected the folder to make")
    if options.kind == "stats":
        return _statistics(options)
    if options.kind == semantic_ids.ASSIGN:
        return semantic_ids.prepare(options, _writing(options, 16384))
    if options.kind == semantic_ids.JOIN:
        return semantic_ids.prepare(options)
    if options.kind == "synthetic":
        return _synthetic(options)
    if options.kind == "parquet":
        return _log(options)
    if options.kind == "synthetic-funnel":
        shape = FunnelConfig(**{name: getattr(options, name) for name in FUNNEL})
        writing = _writing(options, min(max(shape.rows // 64, 1024), 16384))
        found = write_funnel(shape, options.output, writing, overwrite=options.overwrite)
        return "\n".join([f"synthetic-funnel: {shape.rows:,} rows", *_ceilings_of_tasks(found)])
    if options.kind == "synthetic-histories":
        config = HistoriesConfig(**{name: getattr(options, name) for name in HISTORIES})
        writing = _writing(options, min(max(config.rows // 64, 1024), 16384))
        ceilings = write_histories(config, options.output, writing, overwrite=options.overwrite)
        return "\n".join([f"synthetic-histories: {config.rows:,} rows", *_ceilings(ceilings)])
    how = Options(options.overwrite, options.bad_rows, options.block_bytes, _writing(options, 16384))
    if options.kind == "csv":
        return _described(convert_csv(options.config, options.output, how))
    if options.kind == "movielens":
        fractions = (options.valid_fraction, options.test_fraction, options.seed)
        history = _history(options, "timestamp", "user_id") if options.history else None
        where = (options.input, options.output, how, options.split)
        return _described(convert_movielens(*where, *fractions, options.threshold, history))
    convert = convert_criteo if options.kind == "criteo" else convert_avazu
    return _described(convert(_source(options), options.output, how))


def _statistics(options: Namespace) -> str:
    # It draws, which takes long to import.
    from tessera.ctr.report.data_page import PAGE, STATISTICS, VOCABULARY, write_statistics

    if options.min_count < 1:
        raise ConfigError(f"--min-count: found {options.min_count}, expected at least 1")
    counted = {"vocabulary": options.vocabulary, "min_count": options.min_count}
    told = write_statistics(options.data, options.against, options.output, overwrite=options.overwrite, **counted)
    columns = told["columns"]
    drifts = {name: one["drift"]["psi"] for name, one in columns.items() if "psi" in one.get("drift", {})}
    lines = [f"stats: {told['rows']:,} rows, {len(columns)} columns: {options.output}/{STATISTICS} and {PAGE}"]
    if drifts:
        most = max(drifts, key=lambda name: drifts[name])
        lines.append(f"drift: {most} has moved most, population stability index {drifts[most]:.3f}")
    if "vocabulary" in told:
        values = sum(told["vocabulary"].values())
        often = f"that occur at least {options.min_count} times"
        lines.append(f"vocabulary: {values:,} values {often}: {options.output}/{VOCABULARY}")
    return "\n".join(lines)


def _log(options: Namespace) -> str:
    summary = convert_log(
        options.input,
        options.output,
        _history(options, options.time, options.by),
        options.split,
        options.valid_fraction,
        options.test_fraction,
        _writing(options, 16384),
        overwrite=options.overwrite,
        labels=options.label,
    )
    return _described({"kind": "parquet"} | summary)


def _history(options: Namespace, time: str, by: str | None) -> HistoryRule:
    by = options.by or by
    if by is None:
        raise ConfigError("--by: found none, expected the column whose rows of one value are one history, as user_id")
    unit, memory = getattr(options, "time_unit", "s"), options.memory_mb << 20
    return HistoryRule(by, tuple(options.history), options.length, time, options.events_where, unit, memory)


def _writing(options: Namespace, row_group_rows: int) -> Writing:
    rows = row_group_rows if options.row_group_rows is None else options.row_group_rows
    return Writing(rows, options.rows_per_file, options.compression)


def _source(options: Namespace) -> Input:
    named = {name: getattr(options, name) for name in ("train", "valid", "test") if getattr(options, name)}
    if bool(named) == bool(options.input):
        found = "both" if named else "neither"
        raise ConfigError(f"--input and --train: found {found}, expected one of them")
    if getattr(options, "first_day", None):
        return Input(one_day_per_file(options.input or [], options.first_day))
    fractions = (options.valid_fraction, options.test_fraction, options.seed)
    times = [getattr(options, f"{name}_from") for name in ("valid", "test")]
    seconds = [
        None if time is None else seconds_of(time, f"--{name}-from")
        for name, time in zip(("valid", "test"), times, strict=True)
    ]
    return Input(named or {"": options.input}, options.split, *fractions, *seconds)


def _described(summary: dict) -> str:
    rows = ", ".join(f"{name} {count:,}" for name, count in summary["rows"].items())
    dropped = f"; dropped {summary['dropped']:,}" if summary["dropped"] else ""
    lines = [f"{summary['kind']}: rows written: {rows}{dropped}"]
    if summary.get("ties"):
        lines.append(
            f"{summary['ties']:,} rows share user and second with another: none of them is in another's history"
        )
    lines += [f"skipped {count:,} bad rows of {path}" for path, count in summary["bad_rows"].items()]
    return "\n".join(lines)


def _synthetic(options: Namespace) -> str:
    config = SyntheticConfig(**{name: getattr(options, name) for name in [*SYNTHETIC, "string_ids"]})
    writing = _writing(options, row_group_rows_of(config))
    result = write_synthetic(config, options.output, writing, options.threads, overwrite=options.overwrite)
    first = f"synthetic: {config.rows:,} rows, {sum(result['distinct_ids'].values()):,} distinct ids"
    return "\n".join([first, *_ceilings(result)])


def _ceilings_of_tasks(result: dict) -> list[str]:
    """Return the ceilings of each label, split by split."""
    by_task: dict[str, dict] = {}
    for split, found in result["splits"].items():
        for task, one in found["tasks"].items():
            by_task[f"{split}, {task}"] = one
    return _ceilings({"splits": by_task})


def _ceilings(result: dict) -> list[str]:
    lines = []
    for name, split in result["splits"].items():
        auc = "undefined" if split["auc"] is None else f"{split['auc']:.4f}"
        lines.append(
            f"{name}: {split['rows']:,} rows, base rate {split['base_rate']:.4f}; "
            f"no model can do better than AUC {auc}, logloss {split['logloss']:.4f}"
        )
    return lines
