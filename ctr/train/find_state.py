"""Saved states to go on from, or to begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tessera.distributed.rank import Process
from tessera.distributed.saved.manifest import MANIFEST, CheckpointError
from tessera.distributed.saved.states import Saved, has_states, open_saved, states
from tessera.distributed.saved.storage import Storage


def find_saved(path: str, process: Process, warn: Callable[[str], None]) -> Saved:
    """Return the state that a folder is, or the newest below it; also below `checkpoints` in a run's folder.

    Raises CheckpointError: there is none that can be read.
    """
    return next(_states_at(path, process, warn))


def states_to_go_on_from(
    root: Storage, named: str | None, process: Process, warn: Callable[[str], None], problems: list[str]
) -> Iterator[tuple[Saved, bool]]:
    """States, the best first, and whether they are of this run. Their rows are still to be checked.

    root: where this run keeps its states. named: `trainer.resume`. problems: what is wrong with states that were passed
    over; more is added here.

    Raises CheckpointError: this run has states, and none of them can be read. To begin anew would put them aside.
    """

    def note(problem: str) -> None:
        problems.append(problem)
        warn(problem)

    yield from ((saved, True) for saved in states(root, process, note, rows_later=True))
    if has_states(root, process):
        raise CheckpointError(
            f"none of the states in {root.name} can be read, nothing is trained ({'; '.join(problems)}); "
            "to begin anew on purpose, move that folder away or name another trainer.run_dir"
        )
    if named not in (None, "auto"):
        yield from ((saved, False) for saved in _states_at(named, process, note, rows_later=True))


def _states_at(
    path: str, process: Process, warn: Callable[[str], None], *, rows_later: bool = False
) -> Iterator[Saved]:
    """Yield the states of `find_saved`, in order; raise CheckpointError behind the last one."""
    folder = Storage(path)
    if folder.exists(MANIFEST):
        yield open_saved(folder, process, rows_later=rows_later)
    else:
        for root in (folder, folder.below("checkpoints")):
            yield from states(root, process, warn, rows_later=rows_later)
    raise CheckpointError(f"{path} holds no saved state that can be read; expected a state's folder or a run's")
