"""Mistakes in the description of a table: one line that names table, key, what was found and what is expected."""

import pytest

from tessera.embedding.config import Admission, DynamicTableConfig, Group
from tessera.embedding.errors import ConfigError
from tessera.embedding.optim import RowOptimizer


def make(**more):
    return DynamicTableConfig(**{"name": "user", "features": ("u",), "groups": (Group("v", 4, 0.1),), **more})


MISTAKES = {
    "ttl_seconds is 0; expected a number of seconds above 0": {"ttl_seconds": 0},
    "ttl_seconds is -5; expected a number of seconds above 0": {"ttl_seconds": -5},
    "max_rows is 0; expected at least 1": {"max_rows": 0},
    "max_bytes is 10; expected at least the 121 bytes of one row": {"max_bytes": 10},
    "eviction is 'lur'; expected lru, lfu or raise; did you mean lru?": {"eviction": "lur"},
    "evicted_kept is -1; expected at least 0": {"evicted_kept": -1},
    "chunk_rows is 1000; expected a power of two": {"chunk_rows": 1000},
    "groups is []; expected one or more groups": {"groups": ()},
    "groups is ['v', 'v']; expected one or more groups with different": {"groups": (Group("v", 1, 0),) * 2},
    "groups.v.dim is 0; expected at least 1": {"groups": (Group("v", 0, 0.1),)},
    "groups.v.init_std is nan; expected a finite number": {"groups": (Group("v", 1, float("nan")),)},
    "admission.kind is 'exacct'; expected none, exact, sliding, probabilistic or vocabulary; did you mean exact?": {
        "admission": Admission("exacct", 2)
    },
    "admission.threshold is 0; expected at least 1": {"admission": Admission("exact", 0)},
    "admission.threshold is 16; expected at most 15": {"admission": Admission("sliding", 16)},
    "admission.splits is 3; expected at least 4": {"admission": Admission("sliding", 2, splits=3)},
    "admission.capacity is 0; expected at least 1": {"admission": Admission("sliding", 2, capacity=0)},
    "optimizer.name is 'adamm'; expected sgd, adagrad, rowwise_adagrad, adam or ftrl; did you mean adam?": {
        "optimizer": RowOptimizer("adamm")
    },
    "optimizer.lr is inf; expected a finite number above 0": {"optimizer": RowOptimizer("sgd", lr=float("inf"))},
    "optimizer.lr is 0; expected a number above 0": {"optimizer": RowOptimizer("sgd", lr=0)},
    "optimizer.beta2 is 1.0; expected at least 0 and below 1": {"optimizer": RowOptimizer("adam", beta2=1.0)},
    "optimizer.initial_accumulator is 0.1; expected 0 for adam": {
        "optimizer": RowOptimizer("adam", initial_accumulator=0.1)
    },
    "optimizer.l1 is -1; expected at least 0": {"optimizer": RowOptimizer("ftrl", l1=-1)},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_line(message):
    with pytest.raises(ConfigError) as error:
        make(**MISTAKES[message])
    assert str(error.value).startswith(f"table user: {message}") and "\n" not in str(error.value)


def test_a_limit_too_small_for_one_batch():
    make(max_rows=4096).check_batch(4096)
    make().check_batch(10**9)
    with pytest.raises(ConfigError, match="^table user: max_rows 100 is a limit of 100 rows; expected at least 4,096"):
        make(max_rows=100).check_batch(4096)
    with pytest.raises(
        ConfigError, match="^table user: max_bytes 12,100 is a limit of 100 rows; expected at least 4,096"
    ):
        make(max_rows=1000, max_bytes=12100).check_batch(4096)
