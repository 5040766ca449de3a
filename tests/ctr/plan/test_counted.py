"""What a plan says is sent is what real ranks send, counted in their collectives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.plan.estimate import Planner
from tessera.ctr.plan.hardware import PRESETS
from tests.ctr.plan.counted import counted_on_hosts, counted_steps
from tests.ctr.plan.data import statistics_of, write
from tests.ranks import on_ranks

FIRST, STEPS = 3, 4  # the first steps of data parallel send more, once
CLOSE = 0.02
DEEPFM = ["model.hidden=[16]", "model.embedding_dim=8"]
FGCNN = [
    "model=fgcnn",
    "model.channels=[3]",
    "model.kernel=3",
    "model.conv_batch_norm=true",
    "model.classifier.hidden=[8]",
]
JOBS = {
    "rows": DEEPFM,
    "rows in bf16": [*DEEPFM, "embedding.transport=bf16", "embedding.oov=learned", "model.batch_norm=true"],
    "sums of owners": [*DEEPFM, "embedding.pooled_output_dist=always", "embedding.transport=fp16"],
    "both": [*DEEPFM, "embedding.pooled_output_dist=auto", "embedding.rows=1000000", "model.batch_norm=true"],
    "wall clock": [*FGCNN, "model.classifier.hidden=[8]", "embedding.clock=wall", "embedding.transport=bf16"],
    "narrow tables": [
        *DEEPFM,
        "embedding.tables.user={dim: 2, format: int8}",
        "embedding.tables.tags={dim: 4, pooled_output_dist: always}",
    ],
    "by host": [*DEEPFM, "embedding.exchange=by_host", "embedding.tables.tags.pooled_output_dist=always"],
    "by host in bf16": [
        *DEEPFM,
        "embedding.exchange=by_host",
        "embedding.transport=bf16",
        "embedding.format=int8",
        "embedding.alpt.every=2",
    ],
    "perturbed rows": [*DEEPFM, "optimizer.helen.rho=0.05", "embedding.oov=learned", "model.batch_norm=true"],
    "perturbed rows and weights": [
        *DEEPFM,
        "optimizer.helen.rho=0.05",
        "optimizer.helen.dense=true",
        "embedding.pooled_output_dist=auto",
    ],
    "learned scales": [*DEEPFM, "embedding.format=int8", "embedding.alpt.every=2", "model.batch_norm=true"],
}
#: What a plan calls apart and the counter cannot tell apart.
SAME = {
    "ids of bags": "ids",
    "sums of bags": "rows",
    "gradients of bags": "gradients",
    "norms of gradients": "agree",
}


def planned(arguments: list[str], ranks: int, of_host: int) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes and calls of one rank and step, by the names of the counter."""
    config = load_config(arguments, "")
    known = statistics_of(arguments, FIRST, STEPS)
    planner = Planner(config, Schema(config.data.schema), known, PRESETS["cpu"], ranks_per_host=of_host)
    sent, calls = defaultdict(float), defaultdict(float)
    for one in planner.plan(ranks).collectives:
        sent[SAME.get(one.name, one.name)] += one.sent
        calls[SAME.get(one.name, one.name)] += one.calls
    return dict(sent), dict(calls)


def check(ranks: int, folder: Path, names: Iterable[str], of_host: int | None = None) -> None:
    of_host = of_host or ranks
    data = write(folder)
    jobs = {name: [*data, *JOBS[name]] for name in names}
    of_ranks = on_ranks(ranks, counted_on_hosts, of_host, list(jobs.values()), FIRST, STEPS)
    for place, (name, arguments) in enumerate(jobs.items()):
        sent, calls = planned(arguments, ranks, of_host)
        bytes_of, calls_of = zip(*(one[place] for one in of_ranks), strict=True)
        assert set(bytes_of[0]) == set(sent), name
        for kind in sent:
            found = sum(one[kind] for one in bytes_of) / (ranks * STEPS)
            assert sent[kind] == pytest.approx(found, rel=CLOSE), f"{name}: {kind}"
            assert calls[kind] == calls_of[0][kind] / STEPS, f"{name}: calls of {kind}"


def test_one_rank_sends_nothing(tmp_path):
    arguments = [*write(tmp_path), *JOBS["both"]]
    (((sent, _),),) = on_ranks(1, counted_steps, [arguments], FIRST, 1)
    assert not any(sent.values()) and planned(arguments, 1, 1) == ({}, {})


def test_bytes_are_those_that_two_ranks_send(tmp_path):
    check(2, tmp_path, ["rows in bf16", "both", "narrow tables", "perturbed rows"])


@pytest.mark.slow
def test_bytes_are_those_that_two_hosts_of_two_ranks_send(tmp_path):
    check(4, tmp_path, ["by host"], of_host=2)


@pytest.mark.slow
def test_bytes_are_those_that_two_hosts_send(tmp_path):
    check(4, tmp_path, JOBS, of_host=2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_that_ranks_send(ranks, tmp_path):
    check(ranks, tmp_path, JOBS)
