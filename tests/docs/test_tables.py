"""The page of tables: its examples of settings are understood, and its demonstration ends as it says."""

from __future__ import annotations

import re
import shlex

import pyarrow.parquet as pq
import pytest
import yaml

from tessera.ctr.config import load_config
from tests.ctr.train.states import newest, rows_of_state
from tests.docs.pages import ROOT, blocks
from tests.docs.test_tutorial import understood
from tests.ranks import run_script

TEXT = (ROOT / "docs" / "tables.md").read_text()
#: What the reader's folder holds; in the test it lies elsewhere.
HIS = re.compile(r"(?<![\w/])(data/visits|my_conf|runs/visits)")


def test_the_example_of_settings_is_understood(tmp_path):
    example = yaml.safe_load(blocks(TEXT, "yaml")[0])["embedding"]
    (tmp_path / "embedding").mkdir()
    (tmp_path / "embedding" / "mine.yaml").write_text(yaml.safe_dump(example))
    config = load_config(["--config-dir", str(tmp_path), "embedding=mine", "data.schema.time=time"], "")
    found = config.embedding.tables
    assert found["country"] == {"ttl_days": None, "dim": 4}
    assert found["item_id"]["optimizer"] == {"name": "adam"} and found["user_id"]["max_rows"] == 50_000_000


@pytest.mark.slow
def test_user_rows_expire_and_country_rows_do_not(tmp_path):
    (script,), (_, description) = blocks(TEXT, "python"), blocks(TEXT, "yaml")
    exec(HIS.sub(rf"{tmp_path}/\1", script), {"__name__": "__main__"})
    (tmp_path / "my_conf" / "data").mkdir(parents=True)
    (tmp_path / "my_conf" / "data" / "visits.yaml").write_text(HIS.sub(rf"{tmp_path}/\1", description))
    said = ""
    for line in "".join(blocks(TEXT, "sh")).replace("\\\n", " ").splitlines():
        name, arguments, ranks = understood(shlex.split(line))
        moved = [HIS.sub(rf"{tmp_path}/\1", one) for one in arguments]
        done = run_script(f"scripts/{name}.py", *moved, world=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        said += done.stdout
    (shown,) = blocks(TEXT, "text")
    for line in shown.splitlines():
        assert f"\n{line}" in said, line
    visits = pq.read_table(tmp_path / "data" / "visits" / "train")
    user, country, time = (visits[name].to_numpy() for name in ("user", "country", "time"))
    rows = rows_of_state(newest(tmp_path / "runs" / "visits"))
    assert rows["user"].keys() == {*user[time > time.max() - 30 * 86400].tolist()} < {*user.tolist()}
    last_of_0 = time[country == 0].max()
    assert time.max() - last_of_0 > 79 * 86400
    assert int.from_bytes(rows["country"][0]["last_seen"], "little") == last_of_0 and len(rows["country"]) == 20
