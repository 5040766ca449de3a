import pytest
import torch

from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.set_table import SetTable
from tessera.embedding.table_set import TableSet
from tessera.kernels.backend import available_backends, use_backend

# Triton's interpreter is slow: test_gpu_tables.py is what runs on it by default.
MARKS = {"triton": [pytest.mark.slow]}

#: Where kernels are compiled, long tests of other combinations are slow ones. What the reference gives a set is held to
#: what it gives tables by test_table_set.py, and to what compiled kernels give by tests/kernels/test_records.py. Of
#: decay a table or a set is left, whichever; a cache keeps one kind of it for each backend.
LONG = {
    "test_life_of_rows": ("cpp-table", "reference-set"),
    "test_int8_rows_take_less_than_half_of_all_that_a_row_takes": ("reference-table",),
    "test_rows_are_those_of_a_table_that_decays_all_in_every_step": ("adam-table", "ftrl-table", "by count-set"),
    "test_rows_that_are_exported_and_imported_go_on_bit_for_bit": ("table",),
    "test_low_precision_reads_decayed_values_and_changes_nothing_between": (
        *("int8-table", "int4-set", "fp16-table", "fp16-set", "bf16-table"),
    ),
    "test_int8_is_in_expectation_what_decays_densely": ("None-set", "learned1-table"),
    "test_a_snapshot_reads_rows_as_they_decayed_up_to_then": ("set",),
    "test_every_bit_is_that_of_the_table_without_cache": ("cpp-decay", "reference-decay by count"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "cpp" not in available_backends():
        return
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec") or "embedding" not in item.path.parts:
            continue
        given = item.callspec.params
        on_reference = given.get("backend") == "reference" and given.get("of_table") == "set"
        if on_reference or item.callspec.id in LONG.get(item.originalname, ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, [])) for name in available_backends()])
def backend(request):
    """Run the test once for every implementation that this machine has."""
    with use_backend(request.param):
        yield request.param


class AmongOthers(SetTable):
    """A table of a set, with a table before it and one behind it, whose rows lie between its own."""

    def __init__(self, config: DynamicTableConfig, device: torch.device | str = "cpu") -> None:
        names = ("before", config.name, "behind")
        kept = {"groups": config.groups, "optimizer": config.optimizer, "seed": config.seed}
        tables = [config if name == config.name else DynamicTableConfig(name, (name,), **kept) for name in names]
        super().__init__(TableSet(tables, device), 1)
        self._neighbours_have = 0

    def lookup(self, ids, now, counts=None, *, training=True):
        if training:
            self._let_neighbours_grow(ids)
        return super().lookup(ids, now, counts, training=training)

    def import_rows(self, batch):
        self._let_neighbours_grow(batch.ids)
        super().import_rows(batch)

    def _let_neighbours_grow(self, ids):
        """Each takes an extent more; they have the ids of the table, too."""
        step, self.set.step = self.set.step, 0
        more = torch.arange(self._neighbours_have, self._neighbours_have + 40).to(self.device)
        theirs = torch.cat([more, ids[~torch.isin(ids, more)]])
        new = theirs[self.set.find(theirs, torch.tensor([0, len(theirs), len(theirs), len(theirs)])) < 0]
        bounds = torch.tensor([0, len(new), len(new), 2 * len(new)])
        self.set.lookup(torch.cat([new, new]).to(self.device), bounds.to(self.device), 10**9)
        self._neighbours_have += 40
        self.set.step = step


@pytest.fixture
def of_table(request, monkeypatch):
    """Let what the test's module calls DynamicTable be that, or a table of a set."""
    if request.param == "set":
        monkeypatch.setattr(request.module, "DynamicTable", AmongOthers)
    return request.param


#: Marks of a module whose tests are of a table by itself as of one of a set.
both_kinds = pytest.mark.parametrize("of_table", ["table", "set"], indirect=True)
