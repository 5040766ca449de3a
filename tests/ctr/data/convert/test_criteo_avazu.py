"""The two logs against the csv module, line by line."""

import csv
import datetime
import gzip
import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from tessera.ctr.data.convert.avazu import convert_avazu
from tessera.ctr.data.convert.criteo import convert_criteo, one_day_per_file
from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.convert.pipeline import Input, Options, schema_from_conf
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.embedding.errors import ConfigError
from tests.ctr.data.convert.samples import rows, sample

SPLITS = {"train": "train.csv", "valid": "dev.csv", "test": "test.csv"}
CRITEO = ["label"] + [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]


def given(folder):
    return Input({split: [folder / name] for split, name in SPLITS.items()})


def criteo_rows(path):
    expected = []
    with open(path, newline="") as file:
        for line in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            row = {"label": int(line[0])}
            for name, text in zip(CRITEO[1:14], line[1:14], strict=True):
                row[name] = float(np.float32(int(text))) if text else None
            for name, text in zip(CRITEO[14:], line[14:], strict=True):
                row[name] = int(text, 16) if text else None
            expected.append(row)
    return expected


def avazu_rows(path):
    expected = []
    with open(path, newline="") as file:
        names = ["id", "click", "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category"]
        names += ["app_id", "app_domain", "app_category", "device_id", "device_ip", "device_model"]
        names += ["device_type", "device_conn_type"]
        names += [f"C{i}" for i in range(14, 22)]
        for line in csv.reader(file):
            if line[0] == "id":
                continue
            text = dict(zip(names, line, strict=True))
            moment = datetime.datetime.strptime(text["hour"] + "+0000", "%y%m%d%H%z")
            row = {"label": int(text["click"]), "time": int(moment.timestamp())}
            row |= {"hour": moment.hour, "weekday": moment.weekday()}
            for name in names[3:]:
                hexadecimal = name.startswith(("site", "app")) or name in (
                    "device_id",
                    "device_ip",
                    "device_model",
                )
                row[name] = int(text[name], 16 if hexadecimal else 10)
            expected.append(row)
    return expected


@pytest.mark.parametrize(
    ("name", "convert", "parse"),
    [("criteo", convert_criteo, criteo_rows), ("avazu", convert_avazu, avazu_rows)],
)
@pytest.mark.parametrize("block_bytes", [100_000, 1 << 23])
def test_sample_equals_a_slow_parse(tmp_path, name, convert, parse, block_bytes):
    folder, output = sample(f"{name}-sample"), tmp_path / "out"
    summary = convert(given(folder), output, Options(block_bytes=block_bytes))
    for split, file in SPLITS.items():
        expected = parse(folder / file)
        assert summary["rows"][split] == len(expected)
        assert rows(output / split) == expected
    assert json.loads((output / "prepare.json").read_text()) == summary
    assert OmegaConf.to_container(OmegaConf.load(output / "schema.yaml"))["schema"] == schema_from_conf(name)


@pytest.mark.parametrize(("name", "convert"), [("criteo", convert_criteo), ("avazu", convert_avazu)])
def test_reader_takes_the_sample_with_the_schema_beside_it(tmp_path, name, convert):
    summary = convert(given(sample(f"{name}-sample")), tmp_path / "out", Options())
    schema = Schema.from_config(OmegaConf.load(tmp_path / "out" / "schema.yaml")["schema"])
    for split, count in summary["rows"].items():
        reader = ParquetReader(str(tmp_path / "out" / split), schema, batch_size=64)
        assert reader.rows == count
        assert sum(batch.rows for batch in reader.epoch(0)) == count


def test_split_of_one_file_is_the_same_for_every_block_and_packing(tmp_path):
    path = sample("criteo-sample") / "train.csv"
    packed = tmp_path / "train.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    results = []
    for number, (file, block_bytes) in enumerate([(path, 1 << 23), (path, 130_001), (packed, 300_000)]):
        options = Options(block_bytes=block_bytes, writing=Writing(row_group_rows=500, rows_per_file=2000))
        convert_criteo(Input({"": [file]}, valid=0.2, test=0.1, seed=5), tmp_path / str(number), options)
        results.append({split: rows(tmp_path / str(number) / split) for split in SPLITS})
    assert results[0] == results[1] == results[2]
    everything = sorted(str(row) for split in results[0].values() for row in split)
    assert everything == sorted(str(row) for row in criteo_rows(path))
    assert [round(len(results[0][split]) / 7200, 1) for split in SPLITS] == [0.7, 0.2, 0.1]


def small_criteo(tmp_path, extra=b""):
    path = tmp_path / "log.txt"
    line = b"1" + b"\t5" * 13 + b"\t68fd1e64" * 26 + b"\n"
    path.write_bytes(line * 40 + extra + line * 40)
    return path


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"7" + b"\t5" * 13 + b"\tff" * 26, "line 41: column 'label': expected one of 0, 1, found '7'"),
        (
            b"1" + b"\t5" * 13 + b"\tfg" * 26,
            "line 41: column 'C1': expected 1 to 16 hexadecimal digits, found 'fg'",
        ),
        (b"1" + b"\t5.5" * 13 + b"\tff" * 26, "line 41: column 'I1': expected int64, found '5.5'"),
        (b"\t5" * 13 + b"\tff" * 26, "line 41: column 'label': expected one of 0, 1, found nothing"),
        (b"5" + b"\t5" * 12 + b"\tff" * 26, "line 41: expected 40 columns separated by '\\t', found 39: '5"),
    ],
)
def test_bad_line_is_named_and_nothing_is_written_or_it_is_counted(tmp_path, bad, message):
    path = small_criteo(tmp_path, bad + b"\n")
    with pytest.raises(DataError) as error:
        convert_criteo(Input({"train": [path]}), tmp_path / "out", Options())
    assert str(error.value).startswith(f"{path} {message}") and "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.txt"]
    summary = convert_criteo(Input({"train": [path]}), tmp_path / "out", Options(bad_rows="skip"))
    assert summary["bad_rows"] == {str(path): 1}
    assert summary["rows"] == {"train": 80}


def test_files_as_days(tmp_path):
    path = small_criteo(tmp_path)
    summary = convert_criteo(Input(one_day_per_file([path, path], "2013-12-31")), tmp_path / "out", Options())
    assert summary["rows"] == {"day=2013-12-31": 80, "day=2014-01-01": 80}
    with pytest.raises(ConfigError, match="first_day: found 'today'"):
        one_day_per_file([path], "today")


def test_two_files_do_not_repeat_the_same_split(tmp_path):
    path = small_criteo(tmp_path)
    convert_criteo(Input({"": [path, path]}, valid=0.3, test=0.3), tmp_path / "out", Options())
    sizes = {split: len(rows(tmp_path / "out" / split)) for split in SPLITS}
    assert sum(sizes.values()) == 160
    convert_criteo(Input({"": [path]}, valid=0.3, test=0.3), tmp_path / "one", Options())
    assert sizes != {split: 2 * len(rows(tmp_path / "one" / split)) for split in SPLITS}


def avazu_lines(hours):
    rest = "1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,a99f214a,96809ac8,711ee120,1,0"
    return "".join(f"1,0,{hour},{rest},15704,320,50,1722,0,35,100084,79\n" for hour in hours)


def test_avazu_by_day_and_by_time(tmp_path):
    hours = [f"14102{1 + i // 24}{i % 24:02d}" for i in range(72)]
    path = tmp_path / "log.csv"
    path.write_text(avazu_lines(hours))
    summary = convert_avazu(Input({"": [path]}, how="day"), tmp_path / "days", Options())
    assert summary["rows"] == {f"day=2014-10-2{day}": 24 for day in (1, 2, 3)}
    convert_avazu(Input({"": [path]}, how="time", valid=0.25, test=0.125), tmp_path / "time", Options())
    times = {split: [row["time"] for row in rows(tmp_path / "time" / split)] for split in SPLITS}
    assert {split: len(found) for split, found in times.items()} == {"train": 45, "valid": 18, "test": 9}
    assert max(times["train"]) < min(times["valid"]) and max(times["valid"]) < min(times["test"])
    cut = {"valid_from": times["train"][10], "test_from": times["train"][12]}
    summary = convert_avazu(Input({"": [path]}, how="time", **cut), tmp_path / "cut", Options())
    assert summary["rows"] == {"train": 10, "valid": 2, "test": 60}


def test_row_without_time_is_bad_where_time_splits(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(avazu_lines(["14102100", "", "14102101"]))
    with pytest.raises(DataError, match="log.csv line 2: column 'time': expected a time to split by, found nothing"):
        convert_avazu(Input({"": [path]}, how="day"), tmp_path / "out", Options())
    summary = convert_avazu(Input({"": [path]}, how="day"), tmp_path / "out", Options(bad_rows="skip"))
    assert summary["rows"] == {"day=2014-10-21": 2} and summary["bad_rows"] == {str(path): 1}


def test_mistakes_of_the_user(tmp_path):
    path = small_criteo(tmp_path)
    with pytest.raises(DataError, match="nothing.txt: found nothing, expected a file"):
        Input({"": [tmp_path / "nothing.txt"]})
    with pytest.raises(DataError, match="found a folder, expected a file"):
        Input({"": [tmp_path]})
    with pytest.raises(ConfigError, match="split: found 'day', expected random: criteo has no time column"):
        convert_criteo(Input({"": [path]}, how="day"), tmp_path / "out", Options())
    with pytest.raises(ConfigError, match="valid_from and test_from: found one of them"):
        Input({"": [path]}, how="time", valid_from=1)
    with pytest.raises(ConfigError, match="valid_from: found with the split random"):
        Input({"": [path]}, valid_from=1, test_from=2)
    with pytest.raises(DataError, match="test: no rows left after reading"):
        convert_criteo(Input({"": [path]}, valid=0.5, test=1e-9), tmp_path / "out", Options())
    with pytest.raises(ConfigError, match="bad_rows: found 'ignore'"):
        Options(bad_rows="ignore")
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.txt"]
