"""`published/latest`: the one file that says which publications are to be served.

It has a checksum of its own, and nothing that it says is believed before it is checked: it may be damaged, or come from
somebody else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tessera.ctr.daily.day_record import DayRecord
from tessera.distributed.saved.manifest import CheckpointError, check, checksum, is_inside, read_manifest, shown
from tessera.distributed.saved.storage import Storage

LATEST = "latest"
#: Files of publications by name: how they are known where a manifest is damaged.
OF_A_MODEL = re.compile(r"manifest\.json|training\.json|dense/[^/]+|(rows|gone)/[^/]+/\d{5}-of-\d{5}\.parquet")
LINK = {"name": str, "checksum": str}
PATTERN = {"partition": str, "step": int, "chain": [LINK], "checksum": str}


def chain_of(records: Iterable[DayRecord]) -> list[str]:
    """Return the partitions of the publications that the newest one is made of, the whole one first."""
    chain: list[str] = []
    for record in records:
        if record.published == "full":
            chain = [record.partition]
        elif record.published == "delta":
            chain.append(record.partition)
    return chain


def write_latest(root: Storage, records: Sequence[DayRecord]) -> None:
    """Replace `latest` as one thing, where it does not say so already."""
    chain = chain_of(records)
    manifests = [read_manifest(root.below(name)) for name in chain]
    links = [{"name": name, "checksum": m["checksum"]} for name, m in zip(chain, manifests, strict=True)]
    said = {"partition": chain[-1], "step": manifests[-1]["step"], "chain": links}
    content = (json.dumps(said | {"checksum": checksum(said)}, indent=1) + "\n").encode()
    if not root.exists(LATEST) or root.read(LATEST) != content:
        root.write_whole(LATEST, content)


def read_latest(root: Storage) -> dict[str, Any]:
    """Return what `latest` says: partition, step, and the chain of publications as name and checksum, the whole one
    first.

    Raises CheckpointError: there is none, or it is not as it was written; one line that says what to do.
    """
    try:
        latest = json.loads(root.read(LATEST))
    except FileNotFoundError:
        raise CheckpointError(f"{root.name} holds no {LATEST}: nothing is published there") from None
    except OSError as error:
        raise CheckpointError(f"{root.name}: {LATEST} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise _damaged(root, "it is no JSON") from None
    if not isinstance(latest, dict):
        raise _damaged(root, f"it is {shown(latest)}; expected an object")
    try:
        check(latest, PATTERN, "it")
    except CheckpointError as error:
        raise _damaged(root, str(error)) from None
    names = [link["name"] for link in latest["chain"]]
    if latest["checksum"] != checksum(latest):
        raise _damaged(root, "its checksum does not match")
    if not names or names[-1] != latest["partition"] or len(set(names)) < len(names):
        raise _damaged(root, f"its chain is {shown(names)}; expected different names up to {latest['partition']}")
    for name in names:
        if not is_inside(name) or "/" in name:
            raise _damaged(root, f"it names {shown(name)}; expected a folder beside it")
    return latest


def is_served(root: Storage, name: str) -> bool:
    """Return whether `latest` names a publication as it is there, as the newest of its chain."""
    try:
        link = read_latest(root)["chain"][-1]
        return link == {"name": name, "checksum": read_manifest(root.below(name))["checksum"]}
    except CheckpointError:
        return False


def _damaged(root: Storage, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{root.name}: {LATEST} is damaged: {problem}; start the run's `tessera daily` again, which writes it anew"
    )
