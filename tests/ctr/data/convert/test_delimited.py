import numpy as np
import pyarrow as pa
import pytest

from tessera.ctr.data.convert.delimited import BadRows, TextFormat, read_tables
from tessera.ctr.data.errors import DataError, SchemaError

COMMA = TextFormat(",", ("n", "s"), header="auto")
TYPES = {"n": pa.int64(), "s": pa.string()}


def read(tmp_path, data: bytes, text=COMMA, types=TYPES, policy="raise", block_bytes=1 << 20):
    path = tmp_path / "log.csv"
    path.write_bytes(data)
    bad_rows = BadRows(policy)
    tables = list(read_tables(path, text, types, bad_rows, block_bytes))
    found = [row for table in tables for row in table.table.to_pylist()]
    lines = [line for table in tables for line in table.lines.tolist()]
    return found, lines, bad_rows


@pytest.mark.parametrize("block_bytes", [1, 3, 10, 1 << 20])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("header", [b"", b"n,s\n"])
def test_values_and_line_numbers(tmp_path, block_bytes, newline, header):
    lines = [b"1,a", b"", b"2,", b",b", b'4,"c,d"', b"5,e"]
    found, numbers, _ = read(tmp_path, header + newline.join(lines) + newline, block_bytes=block_bytes)
    first = 2 if header else 1
    assert numbers == [first + i for i in (0, 2, 3, 4, 5)]
    values = [(1, "a"), (2, None), (None, "b"), (4, "c,d"), (5, "e")]
    assert found == [{"n": n, "s": s} for n, s in values]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"x,a", "line 4: column 'n': expected int64, found 'x'"),
        (b"99999999999999999999,a", "line 4: column 'n': expected int64, found '99999999999999999999'"),
        (b"1", "line 4: expected 2 columns separated by ',', found 1: '1'"),
        (b"1,2,3", "line 4: expected 2 columns separated by ',', found 3: '1,2,3'"),
        (b"1,\xff", "line 4: column 's': expected string, found invalid UTF8 data"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path, bad, message):
    data = b"1,a\n2,b\n\n" + bad + b"\n5,e\n"
    with pytest.raises(DataError) as error:
        read(tmp_path, data)
    assert str(error.value) == f"{tmp_path / 'log.csv'} {message}"
    for block_bytes in (1, 9, 1 << 20):
        found, numbers, bad_rows = read(tmp_path, data, policy="skip", block_bytes=block_bytes)
        assert [row["n"] for row in found] == [1, 2, 5]
        assert numbers == [1, 2, 5]
        assert bad_rows.counts == {str(tmp_path / "log.csv"): 1}


def test_many_bad_rows_among_good_ones(tmp_path):
    generator = np.random.default_rng(0)
    bad = generator.random(3000) < 0.2
    data = b"".join(b"x,a\n" if wrong else b"%d,a\n" % i for i, wrong in enumerate(bad))
    found, numbers, bad_rows = read(tmp_path, data, policy="skip", block_bytes=4000)
    assert [row["n"] for row in found] == np.flatnonzero(~bad).tolist()
    assert numbers == (np.flatnonzero(~bad) + 1).tolist()
    assert bad_rows.skipped == bad.sum()


def test_skipping_ends_when_most_rows_are_bad(tmp_path):
    with pytest.raises(DataError, match="more than good ones"):
        read(tmp_path, b"x;a\n" * 5000, policy="skip")


def test_quote_left_open_is_named(tmp_path):
    with pytest.raises(DataError, match="line 2: expected every quote '\"' closed on its line"):
        read(tmp_path, b'1,a\n2,"b\n3,c"\n4,d\n')
    text = TextFormat(",", ("n", "s"), quote=None)
    assert read(tmp_path, b'1,a\n2,"b\n', text)[0][1]["s"] == '"b'


def test_carriage_return_inside_a_line(tmp_path):
    data = b"1,a\n2,b\r3,c\n4,d\n"
    with pytest.raises(DataError, match=r"line 2: expected one row, found 2: '2,b\\r3,c'"):
        read(tmp_path, data)
    found, numbers, _ = read(tmp_path, data, policy="skip")
    assert (found, numbers) == ([{"n": 1, "s": "a"}, {"n": 4, "s": "d"}], [1, 3])


def test_columns_are_found_by_header_in_any_order(tmp_path):
    text = TextFormat(",", header="yes")
    found, _, _ = read(tmp_path, b's,"more, or less",n\na,0,1\n', text)
    assert found == [{"n": 1, "s": "a"}]
    with pytest.raises(SchemaError, match="column 's' not found.*'n, other'"):
        read(tmp_path, b"n,other\n1,a\n", text)
    with pytest.raises(SchemaError, match="column name 'n' found twice"):
        read(tmp_path, b"n,n,s\n1,1,a\n", text)


def test_long_delimiter_and_encoding(tmp_path):
    text = TextFormat("::", ("n", "s"), encoding="latin1", quote=None)
    found, _, _ = read(tmp_path, "1::Amélie: a film\n".encode("latin1"), text)
    assert found == [{"n": 1, "s": "Amélie: a film"}]
    with pytest.raises(DataError, match="separated by '::', found 3: '1::2::3'"):
        read(tmp_path, b"1::2::3\n", text)


def test_empty_file(tmp_path):
    with pytest.raises(DataError, match="log.csv: empty file"):
        read(tmp_path, b"")
    assert read(tmp_path, b"n,s\n")[0] == []
