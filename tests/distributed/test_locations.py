"""One way to join names onto paths and URIs, and one way to open them."""

from __future__ import annotations

import pytest

from tessera.distributed.locations import filesystem_of, joined
from tessera.distributed.saved.storage import Storage
from tessera.embedding.errors import ConfigError

QUERY = "?endpoint_override=127.0.0.1:9000&scheme=http"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/data", "/data/day=2026-01-01/a b"),
        ("/data/", "/data/day=2026-01-01/a b"),
        ("/", "/day=2026-01-01/a b"),
        ("data/what?", "data/what?/day=2026-01-01/a b"),  # a path of this host has no query
        ("memory://data", "memory://data/day=2026-01-01/a b"),
        ("s3://bucket/x", "s3://bucket/x/day=2026-01-01/a%20b"),
        (f"s3://bucket/x/{QUERY}", f"s3://bucket/x/day=2026-01-01/a%20b{QUERY}"),
        (f"s3://bucket{QUERY}", f"s3://bucket/day=2026-01-01/a%20b{QUERY}"),
    ],
)
def test_names_go_in_front_of_the_query(location, expected):
    assert joined(location, "day=2026-01-01", "a b") == expected


@pytest.mark.parametrize("name", ["a b", "50%", "x?y", "day=2026-01-01", "a%2Fb", "ü", "a#b"])
def test_a_joined_name_is_the_name_that_is_opened(name):
    _, path = filesystem_of(joined(f"s3://bucket/x{QUERY}", name))
    assert path == f"bucket/x/{name}"
    _, path = filesystem_of(joined("/data", name))
    assert path == f"/data/{name}"


def test_folders_below_and_beside_are_found_again_by_their_names():
    for root in (f"s3://bucket/x{QUERY}", "memory://data/x", "/data/x", "gs://bucket/x"):
        folder = Storage(root)
        for other in (folder.below("a b"), folder.below("c").beside("a b"), Storage(folder.below("a b").name)):
            assert other.name == joined(root, "a b") and other.full("f") == folder.full("a b/f")
        assert other.base_name == "a b"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("nowhere://x", "Protocol not known: nowhere"),
        ("s3://bucket/a b", "Cannot parse URI"),
        ("s3://bucket/x?foo=1", "Unexpected query parameter in S3 URI: 'foo'"),
        ("sftp://host/x", "cannot be opened"),  # its package is not there
    ],
)
def test_what_cannot_be_opened_is_named(location, reason):
    for opening in (filesystem_of, Storage):
        with pytest.raises(ConfigError, match="cannot be opened") as raised:
            opening(location)
        assert str(raised.value).startswith(location) and reason in str(raised.value)
        assert "\n" not in str(raised.value)
