import gzip

import pytest

from tessera.ctr.data.convert import lines
from tessera.ctr.data.convert.lines import read_line_blocks
from tessera.ctr.data.errors import DataError

TEXT = b"".join(b"%d,%s\n" % (i, b"x" * (i % 50)) for i in range(500))


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_blocks_are_whole_lines_and_add_up_to_the_file(tmp_path, block_bytes, suffix):
    path = tmp_path / f"log.{suffix}"
    path.write_bytes(gzip.compress(TEXT) if suffix.endswith("gz") else TEXT)
    told = []
    blocks = list(read_line_blocks(path, block_bytes, told.append))
    assert b"".join(block.data for block in blocks) == TEXT
    assert all(block.data.endswith(b"\n") for block in blocks)
    for block in blocks:
        assert block.data.startswith(b"%d," % (block.first_line - 1))
    assert sum(told) == path.stat().st_size


def test_last_line_without_newline_and_byte_order_mark(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xef\xbb\xbfa\nb")
    assert b"".join(block.data for block in read_line_blocks(path, 100)) == b"a\nb\n"


def test_gzip_members_after_another_are_one_text(tmp_path):
    path = tmp_path / "log.gz"
    path.write_bytes(gzip.compress(b"a\nb") + gzip.compress(b"c\nd\n"))
    assert b"".join(block.data for block in read_line_blocks(path, 3)) == b"a\nbc\nd\n"


def test_errors_name_the_file(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="nothing.csv: cannot be opened"):
        list(read_line_blocks(tmp_path / "nothing.csv", 10))
    torn = tmp_path / "torn.gz"
    torn.write_bytes(gzip.compress(TEXT)[:-20])
    with pytest.raises(DataError, match=r"torn.gz: cannot be read past line \d+"):
        list(read_line_blocks(torn, 100))
    monkeypatch.setattr(lines, "LONGEST_LINE_BYTES", 100)
    long = tmp_path / "long.csv"
    long.write_bytes(b"short\n" + b"x" * 300)
    with pytest.raises(DataError, match="long.csv line 2: longer than 100 bytes"):
        list(read_line_blocks(long, 10))
