"""Open paths and URIs of folders and files, and join names onto them: one way for each.

A URI may end in a query that says how to reach its store (`s3://bucket/runs?endpoint_override=127.0.0.1:9000`). A name
that is joined onto it goes before the query.
"""

from __future__ import annotations

import os
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs

from tessera.embedding.errors import ConfigError

ARROW_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")  # their URIs have names percent-encoded
WITHOUT_FOLDERS = ("s3", "gcs", "abfs")  # as Arrow calls stores in which a file needs no folder to lie in


def filesystem_of(location: str) -> tuple[pa.fs.FileSystem, str]:
    """Return the file system of a path or URI, and the path inside it.

    Arrow's own clients are taken where they know the scheme, because they work without the interpreter's lock; fsspec
    opens what they do not know. Only a path of this host is opened as `pyarrow.fs.LocalFileSystem`.

    Raises ConfigError, naming the location: nothing here can open it.
    """
    scheme = location.partition("://")[0] if "://" in location else None
    if scheme is None:
        return pa.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(location))
    try:
        if scheme in ARROW_SCHEMES:
            opened, inside = pa.fs.FileSystem.from_uri(location)
            return opened, str(inside)
        import fsspec

        # A listing that is kept would not show the states, days and markers that others write meanwhile.
        filesystem, path = fsspec.core.url_to_fs(location, use_listings_cache=False)
    except (ImportError, ValueError, NotImplementedError, OSError) as error:
        raise ConfigError(f"{location} cannot be opened: {' '.join(str(error).split())}") from None
    return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(filesystem)), path


def missing_bucket(location: str) -> str | None:
    """Return the bucket of a URI if its store has none of that name: a listing would say only that nothing lies there.

    Raises OSError: the store does not answer, or denies.
    """
    filesystem, path = filesystem_of(location)
    bucket = path.partition("/")[0]
    if filesystem.type_name not in WITHOUT_FOLDERS:
        return None
    return bucket if filesystem.get_file_info(bucket).type == pa.fs.FileType.NotFound else None


def joined(location: str, *names: str) -> str:
    """Return a path or URI with names behind it, in front of the query of a URI."""
    if "://" not in location:
        return "/".join([location.rstrip("/") if location != "/" else "", *names]) if names else location
    path, mark, query = location.partition("?")
    if path.partition("://")[0] in ARROW_SCHEMES:
        names = tuple(quote(name, safe="/=:+,@!$&'()*;") for name in names)
    return "/".join([path.rstrip("/"), *names]) + mark + query
