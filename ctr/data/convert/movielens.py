"""Convert MovieLens ratings to a click task: rating above the threshold -> 1, below -> 0, equal -> dropped.

Read are the layouts of GroupLens (ml-100k with u.data; ml-1m and ml-10m with ratings.dat; ml-20m, ml-25m and
latest with ratings.csv) and of RecBole (.inter, .user, .item). Ratings stream; the tables of users and of
movies, tens of thousands of rows, are held in memory and joined to each block. What a layout does not have
(ml-25m has no users) is null. Columns: label, user_id, item_id, age, gender, occupation, zip_code,
release_year, genre (list), timestamp (seconds).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tessera.ctr.data.convert.columns import Column, make_columns, text_types
from tessera.ctr.data.convert.delimited import BadRows, TextFormat, TextTable, read_tables
from tessera.ctr.data.convert.histories import HistoryRule
from tessera.ctr.data.convert.logs import add_histories, log_of, with_features
from tessera.ctr.data.convert.output import complete_folder, write_description
from tessera.ctr.data.convert.pipeline import Conversion, Input, Options, convert, schema_from_conf
from tessera.ctr.data.errors import DataError
from tessera.embedding.errors import ConfigError

ALL = "all_rows"  # of a conversion that comes before the histories
USER_TYPES = {"age": pa.int64(), "gender": pa.string(), "occupation": pa.string(), "zip_code": pa.string()}
ML_100K_FLAGS = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
]
ML_100K_FLAGS += ["Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi"]
ML_100K_FLAGS += ["Thriller", "War", "Western"]


@dataclass(frozen=True)
class SideFile:
    """The file of users or of movies: its pattern in the folder, its layout, its columns; the first is the
    key."""

    pattern: str
    text: TextFormat
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Layout:
    """One way in which MovieLens is published. ratings: columns user, item, rating, time in this order.

    year: regular expression whose group `year` finds it in the movie column `year`. genres: what separates
    them in the movie column `genre`; None: one 0/1 column per genre.
    """

    ratings: str
    text: TextFormat
    names: tuple[str, str, str, str]
    users: SideFile | None
    movies: SideFile
    year: str
    genres: str | None


def _text(
    delimiter: str, *columns: str, header: str = "no", encoding: str = "utf8", quote: str | None = None
) -> TextFormat:
    return TextFormat(delimiter, columns, header, encoding, quote)


_RATING_NAMES = ("user", "item", "rating", "time")
_YEAR_IN_TITLE = r"\((?P<year>\d{4})\)\s*$"
_TITLE_AND_GENRES = (Column("id"), Column("year", "title", "string"), Column("genre", type="string"))
_DAT_MOVIES = SideFile("movies.dat", _text("::", "id", "title", "genre", encoding="latin1"), _TITLE_AND_GENRES)

ML_100K = Layout(
    ratings="u.data",
    text=_text("\t", *_RATING_NAMES),
    names=_RATING_NAMES,
    users=SideFile(
        "u.user",
        _text("|", "id", *USER_TYPES),
        (Column("id"), Column("age"), *(Column(name, type="string") for name in list(USER_TYPES)[1:])),
    ),
    movies=SideFile(
        "u.item",
        _text("|", "id", "title", "release", "video", "url", *ML_100K_FLAGS, encoding="latin1"),
        (
            Column("id"),
            Column("year", "release", "string"),
            *(Column(g, values=(0, 1)) for g in ML_100K_FLAGS),
        ),
    ),
    year=r"(?P<year>\d{4})\s*$",
    genres=None,
)
ML_1M = Layout(
    ratings="ratings.dat",
    text=_text("::", *_RATING_NAMES),
    names=_RATING_NAMES,
    users=SideFile(
        "users.dat",
        _text("::", "id", "gender", "age", "occupation", "zip_code"),
        (Column("id"), Column("age"), *(Column(name, type="string") for name in list(USER_TYPES)[1:])),
    ),
    movies=_DAT_MOVIES,
    year=_YEAR_IN_TITLE,
    genres="|",
)
ML_CSV = Layout(
    ratings="ratings.csv",
    text=_text(",", header="yes", quote='"'),
    names=("userId", "movieId", "rating", "timestamp"),
    users=None,
    movies=SideFile(
        "movies.csv",
        _text(",", header="yes", quote='"'),
        (Column("id", "movieId"), Column("year", "title", "string"), Column("genre", "genres", "string")),
    ),
    year=_YEAR_IN_TITLE,
    genres="|",
)


def _recbole(genre: str) -> Layout:
    text = _text("\t", header="yes")
    users = (Column("id", "user_id:token"), Column("age", "age:token")) + tuple(
        Column(name, f"{name}:token", "string") for name in list(USER_TYPES)[1:]
    )
    year = Column("year", "release_year:token", "string")
    return Layout(
        ratings="*.inter",
        text=text,
        names=("user_id:token", "item_id:token", "rating:float", "timestamp:float"),
        users=SideFile("*.user", text, users),
        movies=SideFile(
            "*.item",
            text,
            (Column("id", "item_id:token"), year, Column("genre", f"{genre}:token_seq", "string")),
        ),
        year=r"^(?P<year>\d{4})$",
        genres=" ",
    )


def convert_movielens(
    folder: Path,
    output: Path,
    options: Options,
    how: str = "random",
    valid: float = 0.1,
    test: float = 0.1,
    seed: int = 2026,
    threshold: float = 3.0,
    history: HistoryRule | None = None,
) -> dict:
    """Convert the ratings in `folder`, split "random" (by seed) or by "time" (the latest are the test).

    history: what of the ratings before it each row gets as lists, by time; the column `rating` may be among them.
    Returns and raises as `pipeline.convert`, and DataError when the folder holds no known layout.
    """
    if history is not None:
        return _with_histories(folder, output, options, (valid, test), threshold, history, how)
    if how not in ("random", "time"):
        raise ConfigError(f"split: found {how!r}, expected random or time (MovieLens is not in order of time)")
    layout = _detect(folder)
    bad_rows = BadRows(options.bad_rows)
    return _convert(folder, output, options, (how, valid, test, seed), _Join(layout, folder, threshold, bad_rows))


def _convert(folder: Path, output: Path, options: Options, split: tuple[str, float, float, int], join: _Join) -> dict:
    layout, bad_rows = join.layout, join.bad_rows
    user, item, rating, time = layout.names
    columns = [
        Column("user_id", user, required=True),
        Column("item_id", item, required=True),
        Column("rating", rating, "float64", required=True),
        Column("timestamp", time, "time"),
    ]
    conversion = Conversion("movielens", layout.text, columns, schema_from_conf("movielens"), join, "timestamp")
    source = Input({"": [_one(folder, layout.ratings)]}, *split)
    return convert(conversion, source, output, options, bad_rows, [folder])


def _with_histories(
    folder: Path, output: Path, options: Options, fractions: tuple[float, float], threshold: float, rule: HistoryRule,
    how: str,
) -> dict:  # fmt: skip
    if how != "time":
        raise ConfigError(
            f"--split: found {how}, expected time: rows split at random would show the events and labels of test rows "
            "in the histories of training rows"
        )
    bad_rows = BadRows(options.bad_rows)
    join = _Join(_detect(folder), folder, threshold, bad_rows, with_rating=True)
    with complete_folder(output, [folder], overwrite=options.overwrite) as made:
        first = _convert(folder, made / ALL, options, ("random", 0.0, 0.0, 0), join)
        log = log_of([made / ALL], kept=False)
        stored = pq.read_schema(log.files[0][1])
        summary = add_histories(log, made, rule, how, fractions, options.writing)
        shutil.rmtree(made / ALL)
        summary = {"kind": "movielens"} | summary | {key: first[key] for key in ("files", "dropped", "bad_rows")}
        write_description(made, with_features(schema_from_conf("movielens"), rule, stored), summary)
    return summary


def _detect(folder: Path) -> Layout:
    for layout in (ML_100K, ML_1M, ML_CSV):
        if (folder / layout.ratings).is_file():
            return layout
    if next(folder.glob("*.inter"), None):
        with _one(folder, "*.item").open(encoding="utf8", errors="replace") as file:
            header = file.readline().split()
        return _recbole(next((name for name in ("class", "genres") if f"{name}:token_seq" in header), "genre"))
    raise DataError(f"{folder}: no MovieLens found, expected u.data, ratings.dat, ratings.csv or *.inter in it")


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{folder}: {len(found)} files {pattern} found, expected one")
    return found[0]


def _read_side(folder: Path, side: SideFile, bad_rows: BadRows) -> pa.Table:
    path = _one(folder, side.pattern)
    tables = [
        make_columns(rows, side.columns, bad_rows).table
        for rows in read_tables(path, side.text, text_types(side.columns), bad_rows)
    ]
    if not tables:
        raise DataError(f"{path}: no rows found, expected at least one")
    return pa.concat_tables(tables).combine_chunks()


class _Join:
    """Turns rows of ratings into rows of the click task: label, and the columns of the user and of the
    movie."""

    def __init__(
        self, layout: Layout, folder: Path, threshold: float, bad_rows: BadRows, *, with_rating: bool = False
    ) -> None:
        self.layout, self.threshold, self.bad_rows, self.with_rating = layout, threshold, bad_rows, with_rating
        users = _read_side(folder, layout.users, bad_rows) if layout.users else None
        movies = _read_side(folder, layout.movies, bad_rows)
        self.user_ids = users.column("id") if users else pa.chunked_array([], pa.int64())
        self.movie_ids = movies.column("id")
        self.of_user = {name: users.column(name) if users else pa.nulls(0, t) for name, t in USER_TYPES.items()}
        year = pc.struct_field(pc.extract_regex(movies.column("year"), layout.year), "year")
        self.of_movie = {"release_year": year.cast(pa.int64()), "genre": _genres(movies, layout.genres)}

    def __call__(self, rows: TextTable) -> TextTable:
        rating = rows.table.column("rating").to_numpy()
        kept = pa.array(np.flatnonzero(rating != self.threshold))
        table = rows.table.take(kept)
        columns: dict[str, pa.ChunkedArray] = {
            "label": pa.chunked_array([pa.array((table.column("rating").to_numpy() > self.threshold).astype(np.int8))]),
            "user_id": table.column("user_id"),
            "item_id": table.column("item_id"),
        }
        user = pc.index_in(table.column("user_id"), self.user_ids)
        columns |= {name: column.take(user) for name, column in self.of_user.items()}
        movie = pc.index_in(table.column("item_id"), self.movie_ids)
        columns |= {name: column.take(movie) for name, column in self.of_movie.items()}
        columns["timestamp"] = table.column("timestamp")
        if self.with_rating:
            columns["rating"] = table.column("rating").cast(pa.float32())
        return TextTable(rows.path, pa.table(columns), rows.lines[kept.to_numpy()])


def _genres(movies: pa.Table, separator: str | None) -> pa.Array:
    """Return a list<string> per movie; movies without a genre have an empty list."""
    if separator is None:
        flags = np.stack([movies.column(name).to_numpy() for name in ML_100K_FLAGS], axis=1) == 1
        offsets = np.concatenate(([0], np.cumsum(flags.sum(axis=1)))).astype(np.int32)
        names = pa.array(ML_100K_FLAGS).take(pa.array(np.nonzero(flags)[1]))
        return pa.ListArray.from_arrays(pa.array(offsets), names)
    text = pc.replace_substring(pc.fill_null(movies.column("genre"), ""), "(no genres listed)", "")
    rows = TextTable(Path(), pa.table({"genre": text}), np.zeros(len(text), np.int64))
    made = make_columns(rows, [Column("genre", type="list<string>", delimiter=separator)], BadRows())
    return made.table.column(0).combine_chunks()
