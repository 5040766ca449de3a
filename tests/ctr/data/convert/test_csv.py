import pytest
from omegaconf import OmegaConf

from tessera.ctr.data.convert.csv import convert_csv
from tessera.ctr.data.convert.pipeline import Options
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.embedding.errors import ConfigError
from tests.ctr.data.convert.samples import rows

LOG = """clicked;at;user;price;tags;note
1;2026-01-01 10:00:00;ff;0.5;a|b;x
0;2026-01-01 11:00:00;;;;x
1;2026-01-02 00:00:00;FFFFFFFFFFFFFFFF;2;c;"x;y"
0;2026-01-03 00:00:00;0;-1e3;NA;x
"""
YAML = """
input: {files: [log.csv]}
delimiter: ";"
null_values: ["", "NA"]
columns:
  - {name: label, source: clicked, type: int8, values: [0, 1]}
  - {name: time, source: at, type: time, format: "%Y-%m-%d %H:%M:%S"}
  - {name: user, type: hex}
  - {name: price, type: float32}
  - {name: tags, type: list<string>, delimiter: "|"}
time: time
split: {how: day}
"""


def write(tmp_path, yaml=YAML, log=LOG):
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "log.yaml").write_text(yaml)
    return tmp_path / "log.yaml"


def test_any_csv_by_a_yaml(tmp_path):
    summary = convert_csv(write(tmp_path), tmp_path / "out", Options())
    assert summary["rows"] == {"day=2026-01-01": 2, "day=2026-01-02": 1, "day=2026-01-03": 1}
    first = 1767261600
    assert rows(tmp_path / "out") == [
        {"label": 1, "time": first, "user": 255, "price": 0.5, "tags": ["a", "b"]},
        {"label": 0, "time": first + 3600, "user": None, "price": None, "tags": None},
        {"label": 1, "time": first + 14 * 3600, "user": -1, "price": 2.0, "tags": ["c"]},
        {"label": 0, "time": first + 38 * 3600, "user": 0, "price": -1000.0, "tags": None},
    ]
    schema = OmegaConf.to_container(OmegaConf.load(tmp_path / "out" / "schema.yaml"))["schema"]
    assert schema == {
        "labels": ["label"],
        "time": "time",
        "features": [
            {"name": "user", "kind": "id", "dtype": "int"},
            {"name": "price", "kind": "numeric"},
            {"name": "tags", "kind": "ids", "dtype": "string"},
        ],
    }
    reader = ParquetReader(str(tmp_path / "out"), Schema.from_config(schema), 16)
    assert reader.rows == 4


def test_given_splits_and_own_schema(tmp_path):
    yaml = YAML.replace("files: [log.csv]", "train: [log.csv], test: [log.csv]").replace("split: {how: day}", "")
    yaml += "output: {}\nschema: {{labels: [label], features: [{{name: who, column: user}}]}}\n".format(tmp_path / "o")
    summary = convert_csv(write(tmp_path, yaml), None, Options())
    assert summary["rows"] == {"train": 4, "test": 4}
    schema = OmegaConf.load(tmp_path / "o" / "schema.yaml")["schema"]
    assert schema == {"labels": ["label"], "features": [{"name": "who", "column": "user"}]}


def test_no_header_and_quoted_booleans_of_yaml(tmp_path):
    yaml = """
input: {files: [log.csv]}
header: no
names: [a, b]
columns: [{name: label, source: b, type: int8, values: [0, 1]}, {name: a}]
split: {how: random, valid: 0, test: 0}
"""
    summary = convert_csv(write(tmp_path, yaml, "5,1\n6,0\n"), tmp_path / "out", Options())
    assert summary["rows"] == {"train": 2}
    assert rows(tmp_path / "out") == [{"label": 1, "a": 5}, {"label": 0, "a": 6}]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('delimiter: ";"', "delimeter: ','", "key delimeter"),
        ("type: hex", "type: hexa", "column 'user' has type 'hexa', expected one of"),
        ("how: day", "how: week", "split: found 'week', expected random, time or day"),
        ("time: time\n", "time: at\n", "key time: found 'at', expected a column of type time"),
        ("files: [log.csv]", "valid: [log.csv]", "key input: expected either files, or train"),
        ("columns:", "column:", "key column"),
        ("split: {how: day}", "header: auto", "key names: found none"),
        (
            "split: {how: day}",
            "split: {how: time, valid_from: soon, test_from: 9}",
            "key split.valid_from: found 'soon'",
        ),
        ("how: day}", "how: day", "not yaml"),
        ("how: day}", "how: !!int ''}", "not yaml"),
        ("split: {how: day}", "encoding: utf16", "key encoding: found 'utf16'"),
        ("split: {how: day}", "encoding: none", "key encoding: found 'none'"),
        ("how: day", "valid: much", "key split.valid"),
        ("name: label", "name: Label", "the schema reads column 'label', which is not written"),
    ],
)
def test_mistakes_in_the_yaml_are_one_line(tmp_path, old, new, message):
    assert old in YAML
    with pytest.raises((ConfigError, SchemaError)) as error:
        convert_csv(write(tmp_path, YAML.replace(old, new)), tmp_path / "out", Options())
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_output_and_no_yaml(tmp_path):
    with pytest.raises(ConfigError, match="no output found, expected the key output or the option --output"):
        convert_csv(write(tmp_path), None, Options())
    with pytest.raises(ConfigError, match="nothing.yaml: cannot be read"):
        convert_csv(tmp_path / "nothing.yaml", tmp_path / "out", Options())


def test_times_of_a_wrong_unit_and_dates_that_do_not_exist(tmp_path):
    """The column of event times alone is held to the calendar, and its unit is found out."""
    columns = "columns: [{name: label, type: int8}, {name: time, type: time}, {name: born, type: time, format: '%F'}]"
    yaml = f"input: {{files: [log.csv]}}\n{columns}\ntime: time\nsplit: {{how: random, valid: 0, test: 0}}\n"
    lines = [f"{i % 2},{1_767_225_600_000 + i},1950-02-28" for i in range(20)]
    log = "label,time,born\n" + "\n".join(lines) + "\n"
    with pytest.raises(SchemaError, match="log.csv: column 'time': .* as milliseconds it would be plausible"):
        convert_csv(write(tmp_path, yaml, log), tmp_path / "out", Options(bad_rows="skip"))
    right = yaml.replace("type: time}", "type: time, format: milliseconds}")
    assert convert_csv(write(tmp_path, right, log), tmp_path / "out", Options())["rows"] == {"train": 20}
    wrong = log.replace("1950-02-28", "1950-02-30", 1)
    with pytest.raises(DataError, match="line 2: column 'born': expected a time as %F, found '1950-02-30'"):
        convert_csv(write(tmp_path, right, wrong), tmp_path / "other", Options())
    schema = "schema: {time: time, time_unit: ms, features: [{name: born}]}\n"
    with pytest.raises(SchemaError, match="schema.time_unit is ms; a column of type time is written in s"):
        convert_csv(write(tmp_path, right + schema, log), tmp_path / "other", Options())
    schema = "schema: {time: time, time_from: '2027-01-01', features: [{name: born}]}\n"
    with pytest.raises(DataError, match="line 2: column 'time': expected a time from 2027-01-01 to 2100-01-01 as mill"):
        convert_csv(write(tmp_path, right + schema, log), tmp_path / "other", Options())
