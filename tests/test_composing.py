"""Configurations that tests compose with less work are those that hydra composes."""

import argparse

import pytest
from omegaconf import OmegaConf

from tessera.ctr import config as configuration
from tessera.ctr import overrides as command_line
from tessera.ctr.config import Config
from tessera.ctr.config_help import choices

JOB = ["data=synthetic", "data.path=/data", "trainer.run_dir=/runs/a run", "trainer.batch_size=100"]
LINES = [
    [],
    [*JOB, "model=dcn_v2", "model.cross_layers=2", "model.embedding_dim=4", "embedding=static", "data.test=null"],
    [*JOB, "+model.name=dt=é", "~model.dropout", "optimizer=adam_adagrad", "optimizer.sparse.lr=1e-3"],
    [*JOB, "embedding.formats={w: int8}", "embedding.formats.v=fp16", "data.name=${data.path}=1", "data.lanes=2"],
    [*JOB, "embedding.tables.user_id.dim=4", "trainer.eval_every=3", "daily.skip=[2026-11-01,dt=é]"],
    [*JOB, "trainer.checkpoint.every=3", "trainer.checkpoint.every=5", "model.hidden=[8]", "trainer.amp=true"],
    ["model={target: a.B}", "trainer.batch_size=7"],
    [*JOB, "model=fgcnn", "model@model.classifier=dnn", "numeric=autodis", "model.classifier.hidden=[8]"],
    ["experiment=avazu_x1_deepfm", "model=ipnn", "model.embedding_dim=3"],
    [*JOB, "model=autoint_plus", "numeric=bucketised", "numeric.buckets=7", "+model.more={a: [1, {b: null}]}"],
]
WRONG = [["trainer.epochs=1=2"], ["data.days.nothing=3"], ["model.hiden=[1]"], ["embedding.init=${a.b}"], ["model=x"]]


@pytest.fixture
def by_hydra(monkeypatch):
    """What composes as users have it."""
    given = configuration.config_of
    while hasattr(given, "__wrapped__"):
        given = given.__wrapped__

    def compose(overrides: list[str]) -> Config | str:
        with monkeypatch.context() as plain:
            plain.setattr(command_line, "compose", command_line.compose.__wrapped__)
            plain.setattr(OmegaConf, "unsafe_merge", staticmethod(OmegaConf.unsafe_merge.__wrapped__))
            return result(given, overrides)

    return compose


def result(config_of, overrides: list[str]) -> Config | str:
    """The configuration, or what is said of a mistake."""
    try:
        return config_of(argparse.Namespace(overrides=list(overrides), config_dir=[], cfg=False))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def equal(expected: Config | str, overrides: list[str]) -> bool:
    found = result(configuration.config_of, overrides)
    if isinstance(expected, Config):
        found.export.check = expected.export.check  # no job of tests exports before its first step
    return found == expected


SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in (*LINES[1::2], *WRONG[3:])]


@pytest.mark.parametrize("overrides", [*LINES[::2], *WRONG[:3], *SLOW])
def test_they_are_what_hydra_composes(by_hydra, overrides):
    expected = by_hydra(overrides)
    assert isinstance(expected, str) == (overrides in WRONG)
    assert equal(expected, overrides)
    assert equal(expected, overrides), "what was kept"


@pytest.mark.slow
def test_so_is_every_choice_with_values_of_other_groups(by_hydra):
    for group, names in choices().items():
        for name in names:
            overrides = [*JOB[1:], f"{group}={name}", "optimizer.dense.lr=0.25", "embedding.format=fp16"]
            assert equal(by_hydra(overrides), overrides), name
