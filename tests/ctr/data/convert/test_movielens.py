import csv
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from tessera import conf
from tessera.ctr.data.convert.movielens import convert_movielens
from tessera.ctr.data.convert.pipeline import Options
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.embedding.errors import ConfigError
from tests.ctr.data.convert.samples import rows, sample

RATINGS = [(1, 10, 5, 270100), (1, 20, 3, 270200), (2, 10, 1, 270300), (2, 30, 4, 270400), (3, 20, 2, 270500)]


def everything(output):
    return sorted(
        (row for split in ("train", "valid", "test") for row in rows(output / split)),
        key=lambda row: row["timestamp"],
    )


def row(label, user, item, timestamp, of_user, of_item):
    names = ("age", "gender", "occupation", "zip_code")
    found = {"label": label, "user_id": user, "item_id": item} | dict(zip(names, of_user, strict=True))
    return found | {"release_year": of_item[0], "genre": of_item[1], "timestamp": timestamp}


def expected(users, items):
    kept = [(int(r > 3), u, i, t) for u, i, r, t in RATINGS if r != 3]
    return [row(y, u, i, t, users.get(u, (None,) * 4), items.get(i, (None, None))) for y, u, i, t in kept]


USERS = {1: (24, "M", "writer", "85711"), 2: (53, "F", "other", "94043")}
ITEMS = {10: (1995, ["Animation", "Children's"]), 20: (None, []), 30: (1933, ["Drama"])}


def convert(folder, output, **options):
    # Shares so large that no split of a few rows is empty would be luck: the splits are by time.
    return convert_movielens(folder, output, Options(), how="time", valid=0.25, test=0.25, **options)


def with_hours(ratings):
    return [(u, i, r, t * 3600) for u, i, r, t in ratings]


def test_layout_of_ml_100k(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "u.data").write_text("".join("\t".join(map(str, r)) + "\n" for r in with_hours(RATINGS)))
    (folder / "u.user").write_text("".join(f"{u}|" + "|".join(map(str, v)) + "\n" for u, v in USERS.items()))

    def item(number, title, date, *flags):
        return f"{number}|{title}|{date}||http://x|" + "|".join("1" if k in flags else "0" for k in range(19)) + "\n"

    text = item(10, "Toy Story (1995)", "01-Jan-1995", 3, 4) + item(20, "Amélie", "") + item(30, "M", "1-Feb-1933", 8)
    (folder / "u.item").write_bytes(text.encode("latin1"))
    check(folder, tmp_path / "out")


def test_layout_of_ml_1m(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "ratings.dat").write_text("".join("::".join(map(str, r)) + "\n" for r in with_hours(RATINGS)))
    (folder / "users.dat").write_text("".join(f"{u}::{g}::{a}::{o}::{z}\n" for u, (a, g, o, z) in USERS.items()))
    movies = "10::Toy Story (1995)::Animation|Children's\n20::Amélie::\n30::M: murder (1933)::Drama\n"
    (folder / "movies.dat").write_bytes(movies.encode("latin1"))
    check(folder, tmp_path / "out")


def test_layout_of_ml_25m_without_users(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    lines = ["userId,movieId,rating,timestamp"] + [f"{u},{i},{r}.0,{t}" for u, i, r, t in with_hours(RATINGS)]
    (folder / "ratings.csv").write_text("\n".join(lines))
    movies = 'movieId,title,genres\n10,"Toys, again (1995)",Animation|Children\'s\n20,Amélie,(no genres listed)\n'
    (folder / "movies.csv").write_text(movies + "30,M (1933),Drama\n")
    check(folder, tmp_path / "out", users={})


@pytest.mark.parametrize("genre", ["class", "genre"])
def test_layout_of_recbole(tmp_path, genre):
    folder = tmp_path / "ml"
    folder.mkdir()
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "ml.inter").write_text(header + "".join("\t".join(map(str, r)) + "\n" for r in with_hours(RATINGS)))
    header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    (folder / "ml.user").write_text(
        header + "".join(f"{u}\t" + "\t".join(map(str, v)) + "\n" for u, v in USERS.items())
    )
    header = f"item_id:token\tmovie_title:token_seq\trelease_year:token\t{genre}:token_seq\n"
    (folder / "ml.item").write_text(
        header + "10\tToy Story\t1995\tAnimation Children's\n20\tAmélie\tunknown\t\n30\tM\t1933\tDrama\n"
    )
    check(folder, tmp_path / "out")


def check(folder, output, users=USERS):
    summary = convert(folder, output)
    assert summary["dropped"] == 1
    found = [r | {"timestamp": r["timestamp"] // 3600} for r in everything(output)]
    assert found == expected(users, ITEMS)
    schema = Schema.from_config(OmegaConf.load(output / "schema.yaml")["schema"])
    reader = ParquetReader([str(output / split) for split in ("train", "valid", "test")], schema, 16)
    assert sum(batch.rows for batch in reader.epoch(0)) == 4


def test_threshold_and_missing_ratings(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    lines = ["userId,movieId,rating,timestamp"] + [f"1,10,{r},{t * 3600}" for t, r in enumerate([4, 3.5, 4.5, 5, ""])]
    (folder / "ratings.csv").write_text("\n".join(lines))
    (folder / "movies.csv").write_text("movieId,title,genres\n10,A (1995),Drama\n")
    with pytest.raises(DataError, match="ratings.csv line 6: column 'rating': expected a finite number, found nothing"):
        convert(folder, tmp_path / "out", threshold=4)
    (folder / "ratings.csv").write_text("\n".join(lines[:-1]))
    convert_movielens(folder, tmp_path / "out", Options(), how="time", valid=0, test=0.25, threshold=4)
    assert [row["label"] for row in rows(tmp_path / "out")] == [1, 0, 1]  # test/ comes before train/


def test_sample_equals_a_slow_parse(tmp_path):
    folder = sample("ml-100k")
    summary = convert_movielens(folder, tmp_path / "out", Options(block_bytes=100_000))

    def table(name):
        with open(folder / name, newline="", encoding="utf8") as file:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return lines[1:]

    users = {int(u): (int(a), g, o, z) for u, a, g, o, z in table("ml-100k.user")}
    items = {
        int(i): (int(year) if year.isdigit() and len(year) == 4 else None, genres.split())
        for i, _, year, genres in table("ml-100k.item")
    }
    slow = [
        row(int(float(r) > 3), int(u), int(i), int(float(t)), users[int(u)], items[int(i)])
        for u, i, r, t in table("ml-100k.inter")
        if float(r) != 3
    ]
    found = [r for split in ("train", "valid", "test") for r in rows(tmp_path / "out" / split)]
    key = lambda r: (r["user_id"], r["item_id"], r["timestamp"])  # noqa: E731
    assert sorted(found, key=key) == sorted(slow, key=key)
    assert sum(summary["rows"].values()) == len(slow) == 100_000 - summary["dropped"]
    assert abs(summary["rows"]["train"] / len(slow) - 0.8) < 0.01


def test_ml100k_schema_fits_the_prepared_files():
    folder = sample("ml-100k-random")
    config = OmegaConf.load(Path(conf.__file__).parent / "data" / "ml100k.yaml")
    for split in ("train", "valid", "test"):
        path = folder / config[split]
        reader = ParquetReader(str(path), Schema.from_config(config["schema"]), 1024)
        assert reader.rows == pq.read_metadata(path).num_rows


def test_mistakes_of_the_user(tmp_path):
    with pytest.raises(DataError, match="no MovieLens found, expected u.data, ratings.dat, ratings.csv or"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="split: found 'day', expected random or time"):
        convert_movielens(tmp_path, tmp_path / "out", Options(), how="day")
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,4,1\n")
    with pytest.raises(DataError, match="0 files movies.csv found, expected one"):
        convert(tmp_path, tmp_path / "out")
