"""An S3 server on this machine for tests: HTTP over loopback, a port of its own, objects in memory.

`with object_store(monkeypatch) as store:` or the fixture `store` of tests/conftest.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}


class ObjectStore:
    """A bucket, and its objects as another client sees them."""

    def __init__(self) -> None:
        self.address = "127.0.0.1:0"
        self.start(0)

    def stop(self) -> int:
        """Go away. Returns the port, for `start` to come back with nothing in the bucket."""
        self._server.stop()
        return int(self.address.rpartition(":")[2])

    def start(self, port: int) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        self._server.start()
        self.address = "{}:{}".format(*self._server.get_host_and_port())
        config = Config(retries={"max_attempts": 1}, s3={"addressing_style": "path"})
        self._client = boto3.client("s3", endpoint_url=f"http://{self.address}", config=config)
        # What a server of this process held before is still there.
        urlopen(Request(f"http://{self.address}/moto-api/reset", method="POST")).close()
        self._client.create_bucket(Bucket=BUCKET)

    def answer_requests(self, count: str) -> None:
        """Answer so many more requests ("inf": all), and deny all others."""
        address, headers = f"http://{self.address}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        with suppress(HTTPError):  # it says what was there before, which JSON cannot
            urlopen(Request(address, data=count.encode(), headers=headers, method="POST")).close()

    def uri(self, path: str) -> str:
        """The URI of a path in the bucket, with the query that leads to this server."""
        return f"s3://{BUCKET}/{path}?endpoint_override={self.address}&scheme=http"

    def objects(self, prefix: str = "") -> list[str]:
        """Names of objects that have content; Arrow marks folders by empty ones."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return sorted(one["Key"] for page in pages for one in page.get("Contents", []) if not one["Key"].endswith("/"))

    def get(self, name: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=name)["Body"].read()

    def put(self, name: str, content: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=content)

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=name)

    def get_folder(self, name: str, folder: Path) -> Path:
        """Everything below a name as local files; returns the folder."""
        for one in self.objects(f"{name}/"):
            path = folder / one.removeprefix(f"{name}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.get(one))
        return folder

    def put_folder(self, name: str, folder: Path) -> None:
        """Every file below a local folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())


@contextmanager
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
    store = ObjectStore()
    try:
        yield store
    finally:
        store.stop()
