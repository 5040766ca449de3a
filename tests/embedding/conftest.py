import pytest
import torch

from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.set_table import SetTable
from tessera.embedding.table_set import TableSet
from tessera.kernels.backend import available_backends, use_backend

# Triton's interpreter is slow: test_gpu_tables.py is what runs on it by default.
MARKS = {"triton": [pytest.mark.slow]}

#: Where kernels are compiled, long tests of other combinations are slow ones. What the reference gives a set is held to
#: what it gives tables by test_table_set.py, and to what compiled kernels give by tests/kernels/test_records.py.
LONG = {
    "test_life_of_rows": ("cpp-table", "reference-set"),
    "test_int8_rows_take_less_than_half_of_all_that_a_row_takes": ("reference-table",),
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
