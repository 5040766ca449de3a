r"""Any delimited text, described by a yaml file with the keys of `CsvConfig`:

    input: {files: [log.tsv.gz]}
    delimiter: "\t"
    columns:
      - {name: label, source: clicked, type: int8, values: [0, 1]}
      - {name: time, source: at, type: time, format: "%Y-%m-%d %H:%M:%S"}
      - {name: user, type: hex}
      - {name: price, type: float32}
      - {name: tags, type: list<string>, delimiter: "|"}
    time: time
    split: {how: time, valid: 0.1, test: 0.1}

`columns` says what is written. `schema`, the reader's block of conf/data, is put beside the data as
schema.yaml; where it is left out, every column but label and time becomes a feature by its type.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tessera.ctr.data.convert.columns import Column, check_columns, text_types
from tessera.ctr.data.convert.delimited import TextFormat
from tessera.ctr.data.convert.pipeline import Conversion, Input, Options, convert
from tessera.ctr.data.convert.split import seconds_of
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.schema import Schema, nearest
from tessera.ctr.data.times import TimeRule
from tessera.ctr.yaml_errors import NOT_YAML
from tessera.embedding.errors import ConfigError


@dataclass
class ColumnConfig:
    """One column of the output; the keys mean the same as those of `columns.Column`."""

    name: str = MISSING  # of the column in the output
    source: str | None = None  # its name in the text; default: the name
    # int8 | int16 | int32 | int64 | uint64 | float32 | float64 | string | hex: at most 16 hex digits as 64 bits | time:
    # seconds since 1970, UTC | hour, weekday: of such a time | list<string> | list<int64> | list<float32>
    type: str = "int64"
    stored: str | None = None  # a plain type to write instead of `type`
    format: str = "seconds"  # of times: seconds, milliseconds, microseconds, nanoseconds, or a pattern as %Y-%m-%d
    delimiter: str = " "  # of lists: what stands between the items; several of it in a row count once
    values: list[int] | None = None  # the only values accepted; an empty one is then bad too
    required: bool = False  # true: a row without a value is bad


@dataclass
class InputConfig:
    """Either `files` to be split, or `train`, `valid` and `test`. Relative paths start at the yaml's
    folder. `md5`: sums that the files of these names must have, so that a published split is that split."""

    files: list[str] = field(default_factory=list)  # text files whose rows are split as `split` says
    train: list[str] = field(default_factory=list)  # instead of `files`: those of the training rows
    valid: list[str] = field(default_factory=list)  # instead of `files`: those of the valid split
    test: list[str] = field(default_factory=list)  # instead of `files`: those of the test split
    md5: dict[str, str] = field(default_factory=dict)  # a file's name: the sum that it must have


@dataclass
class SplitConfig:
    """The split of `input.files`: "random", "time" or "day"; times are seconds or ISO dates."""

    how: str = "random"  # random: by file, line and seed | time: the latest rows are test | day: a folder per day
    valid: float = 0.1  # share of the rows, or of the range of times
    test: float = 0.1  # share of the rows, or of the range of times
    seed: int = 2026  # how random: another one draws other rows
    valid_from: str | None = None  # how time: where the valid split begins, instead of a share; seconds or a date
    test_from: str | None = None  # how time: where the test split begins, instead of a share; seconds or a date


@dataclass
class CsvConfig:
    """The whole yaml. time: the output column to split by. names: of the text's columns, where it has no
    header."""

    output: str | None = None  # folder of the data set, if --output names none
    input: InputConfig = field(default_factory=InputConfig)
    delimiter: str = ","  # what stands between the fields of a line
    header: str = "yes"  # yes: the first line names the columns | no | auto: it does if it begins with the first name
    names: list[str] = field(default_factory=list)  # of the columns of the text, where no header says them
    encoding: str = "utf8"  # of the text, as Python calls it
    quote: str | None = '"'  # the sign around fields that hold the delimiter; null: quotes are text
    null_values: list[str] = field(default_factory=lambda: [""])  # fields that stand for: no value
    columns: list[ColumnConfig] = field(default_factory=list)
    time: str | None = None  # the output column to split by
    split: SplitConfig = field(default_factory=SplitConfig)
    # The reader's block of conf/data, put beside the data; without it every column but label and time is a feature.
    schema: dict[str, Any] = field(default_factory=dict)


def convert_csv(config_path: Path, output: Path | None, options: Options) -> dict:
    """Convert what the yaml describes to `output` (default: its key `output`, relative to the working
    folder).

    Returns and raises as `pipeline.convert`; ConfigError for a yaml that cannot be read or contradicts
    itself.
    """
    config = _load(config_path)
    target = output or (Path(config.output) if config.output else None)
    if target is None:
        raise ConfigError(f"{config_path}: no output found, expected the key output or the option --output")
    columns = [_column(column) for column in config.columns]
    times = _check(config, columns, config_path)
    columns = [replace(one, rule=times) if times and one.name == times.column else one for one in columns]
    text = TextFormat(
        config.delimiter,
        tuple(config.names),
        config.header,
        config.encoding,
        config.quote,
        tuple(config.null_values),
    )
    conversion = Conversion(config_path.stem, text, columns, _schema(config, columns), time=config.time)
    source = _input(config, config_path)
    _check_sums(config.input.md5, config_path)
    return convert(conversion, source, target, options, read_too=[config_path])


def _load(path: Path) -> CsvConfig:
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path}: found a list, expected keys such as input and columns")
        if isinstance(loaded.get("header"), bool):
            # yaml reads a bare yes or no as a boolean
            loaded["header"] = "yes" if loaded["header"] else "no"
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CsvConfig), loaded))
        assert isinstance(config, CsvConfig)
        return config
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{path}: key {key}: {str(error).splitlines()[0]}") from error
    except NOT_YAML as error:
        raise ConfigError(f"{path}: not yaml: {' '.join(str(error).split())}") from error


def _check(config: CsvConfig, columns: list[Column], path: Path) -> TimeRule | None:
    """Return which event times are plausible, as the schema says; None if it names no column of them."""
    if not columns:
        raise ConfigError(f"{path}: key columns: found none, expected at least one column to write")
    if config.header not in ("yes", "no", "auto"):
        raise ConfigError(f"{path}: key header: found {config.header!r}, expected yes, no or auto")
    if config.header != "yes" and not config.names:
        raise ConfigError(f"{path}: key names: found none, expected the names of the columns, as header is not yes")
    if len(config.delimiter) < 1 or (config.quote is not None and len(config.quote) != 1):
        raise ConfigError(
            f"{path}: keys delimiter and quote: found {config.delimiter!r} and {config.quote!r}, "
            "expected at least one character and exactly one (or null)"
        )
    try:
        per_byte = "\n".encode(config.encoding) == b"\n"
    except LookupError:
        per_byte = False
    if not per_byte:
        raise ConfigError(f"{path}: key encoding: found {config.encoding!r}, expected utf8, latin1 or the like")
    check_columns(columns, str(path))
    text_types(columns)
    if config.time is not None and config.time not in {c.name for c in columns if c.type == "time"}:
        raise ConfigError(f"{path}: key time: found {config.time!r}, expected a column of type time")
    return _check_schema(_schema(config, columns), columns, path)


def _check_schema(raw: dict, columns: list[Column], path: Path) -> TimeRule | None:
    """Check that the schema holds together, and that every column that it reads is written. Returns its rule of
    times."""
    try:
        schema = Schema.from_config(raw)
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from error
    read = [*schema.labels, schema.weight, schema.group, schema.time]
    for feature in schema.stored:
        read += feature.columns
    written = [column.name for column in columns]
    for name in read:
        if name is not None and name not in written:
            raise SchemaError(
                f"{path}: the schema reads column {name!r}, which is not written; {nearest(name, written)}"
            )
    if schema.times is None or not any(column.name == schema.time and column.type == "time" for column in columns):
        return None
    if schema.times.unit != "s":
        raise SchemaError(f"{path}: schema.time_unit is {schema.times.unit}; a column of type time is written in s")
    return schema.times


def _column(config: ColumnConfig) -> Column:
    values = tuple(config.values) if config.values is not None else None
    return Column(
        config.name,
        config.source,
        config.type,
        config.stored,
        config.format,
        config.delimiter,
        values,
        config.required,
    )


def _input(config: CsvConfig, path: Path) -> Input:
    split, given = config.split, config.input
    named = {name: getattr(given, name) for name in ("train", "valid", "test") if getattr(given, name)}
    if bool(named) == bool(given.files) or (named and "train" not in named):
        raise ConfigError(f"{path}: key input: expected either files, or train with valid and test")
    files = {key: [path.parent / file for file in files] for key, files in (named or {"": given.files}).items()}
    times = [
        None if getattr(split, key) is None else seconds_of(getattr(split, key), f"{path}: key split.{key}")
        for key in ("valid_from", "test_from")
    ]
    return Input(files, split.how, split.valid, split.test, split.seed, *times)


def _check_sums(expected: dict[str, str], path: Path) -> None:
    for name, wanted in expected.items():
        file = path.parent / name
        try:
            with file.open("rb") as stream:
                digest = hashlib.md5(usedforsecurity=False)
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error
        if digest.hexdigest() != wanted:
            raise DataError(f"{file}: md5 {digest.hexdigest()}, expected {wanted}; this is not the published file")


def _schema(config: CsvConfig, columns: list[Column]) -> dict:
    if config.schema:
        return dict(config.schema)
    features = []
    for column in columns:
        if column.name in ("label", config.time):
            continue
        if column.type in ("float32", "float64") or column.stored in ("float32", "float64"):
            features.append({"name": column.name, "kind": "numeric"})
        elif column.type == "list<float32>":
            continue
        else:
            kind = "ids" if column.type.startswith("list") else "id"
            dtype = "string" if "string" in column.type else "int"
            features.append({"name": column.name, "kind": kind, "dtype": dtype})
    schema: dict = {"labels": ["label"]}
    if config.time:
        schema["time"] = config.time
    return schema | {"features": features}
