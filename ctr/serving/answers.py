"""Answers whose labels may still come: blocks of rows in memory, each of which becomes a file that outlives the server.

A file is written once and never again. Which of its rows have their labels in the error memory is said by the memory's
own file, which is replaced as one: so whatever moment a server is killed at, a label counts once or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.tensor_files import sealed, unsealed, write_whole

FORMAT = 1
NAMES = "answers-*.safetensors"
BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class Answer:
    """Rows of one request. token: begins their keys; at: when they were answered, seconds since 1970; base: of their
    model; first: the place in the block."""

    token: str
    at: float
    base: str
    first: int
    rows: int


class Block:
    """Rows that one server has answered one after the other.

    Attributes:
        hidden: float32 [room, H]; prediction: float32 [room]; waits: bool [room], whose labels have not come.
        left: rows that are not too many or too old to be known; a block without any is given up.
        saved: it is in its file.
    """

    def __init__(self, begin: int, number: int, room: int, width: int) -> None:
        """begin: tells the server's start from others, below 2^32; number: of its blocks."""
        self.begin, self.number = begin, number
        self.hidden: np.ndarray = np.empty((room, width), np.float32)
        self.prediction: np.ndarray = np.empty(room, np.float32)
        self.waits: np.ndarray = np.ones(room, bool)
        self.answers: list[Answer] = []
        self.rows = self.left = 0
        self.saved = False

    @property
    def name(self) -> str:
        return f"answers-{self.begin:08x}-{self.number:06d}.safetensors"

    @property
    def written(self) -> np.ndarray:
        """Return whose labels have come, bool [rows]."""
        return ~self.waits[: self.rows]

    def has_room(self, hidden: np.ndarray) -> bool:
        return self.rows + len(hidden) <= len(self.hidden) and hidden.shape[1] == self.hidden.shape[1]

    def add(self, token: str, at: float, base: str, prediction: np.ndarray, hidden: np.ndarray) -> Answer:
        """Take the rows of a request; the block has room for them."""
        answer = Answer(token, at, base, self.rows, len(prediction))
        self.rows += len(prediction)
        self.left += len(prediction)
        self.hidden[answer.first : self.rows], self.prediction[answer.first : self.rows] = hidden, prediction
        self.answers.append(answer)
        return answer

    def shrink(self) -> None:
        """Give up the room that is left: there will be no more rows."""
        if self.rows < len(self.hidden):
            self.hidden, self.prediction = self.hidden[: self.rows].copy(), self.prediction[: self.rows].copy()
            self.waits = self.waits[: self.rows].copy()

    def write(self, folder: Path) -> None:
        """Write the file; what waits is not in it. Raises OSError."""
        bases = sorted({one.base for one in self.answers})
        tensors = {
            "hidden": torch.from_numpy(self.hidden[: self.rows]),
            "prediction": torch.from_numpy(self.prediction[: self.rows]),
            "at": torch.tensor([one.at for one in self.answers], dtype=torch.float64),
            "base": torch.tensor([bases.index(one.base) for one in self.answers]),
            "request": torch.tensor([int(one.token.rpartition("-")[2], 16) for one in self.answers]),
            "rows": torch.tensor([one.rows for one in self.answers]),
        }
        said = {"format": FORMAT, "begin": self.begin, "number": self.number, "bases": bases}
        write_whole(folder / self.name, sealed(tensors, said))
        self.saved = True


def token_of(begin: int, request: int) -> str:
    """Return what begins the keys of a request's rows."""
    return f"{begin:08x}-{request:x}"


def read_block(path: Path) -> Block:
    """Return a block of its file. Raises ExportError: it is none, or was changed; OSError."""
    what = "file of answers"
    found, said = unsealed(path.read_bytes(), path, what, FORMAT)
    try:
        hidden, prediction = found["hidden"].numpy(), found["prediction"].numpy()
        block = Block(int(said["begin"]), int(said["number"]), 0, hidden.shape[1])
        block.hidden, block.prediction, block.waits = hidden, prediction, np.ones(len(hidden), bool)
        columns = (found[name].tolist() for name in ("at", "base", "request", "rows"))
        for at, base, request, rows in zip(*columns, strict=True):
            token = token_of(block.begin, request)
            block.answers.append(Answer(token, at, said["bases"][base], block.rows, rows))
            block.rows += rows
        if not block.rows == len(hidden) == len(prediction) > 0 or path.name != block.name:
            raise ValueError(f"it has {len(hidden)} rows of {block.name}, and answers of {block.rows}")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ExportError(f"{path} is no {what}: {' '.join(str(error).split())[:200]}") from None
    block.left, block.saved = block.rows, True
    return block


def read_blocks(folder: Path, written: dict[str, Tensor]) -> list[Block]:
    """Return the blocks in a folder, oldest first. written: whose labels the memory has, as `written_rows` says it.

    Raises ExportError: one is damaged; remove it to go on without its answers. OSError.
    """
    blocks = sorted((read_block(path) for path in folder.glob(NAMES)), key=lambda one: one.answers[0].at)
    known = dict(_known(written, folder))
    for block in blocks:
        rows = known.get((block.begin, block.number))
        if rows is not None and len(rows) == block.rows:
            block.waits = ~rows
    return blocks


def written_rows(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Return whose labels a memory has, as it is saved with it: int64 [blocks, 3], begin, number and rows, and a bit of
    each row."""
    places = torch.tensor([[one.begin, one.number, one.rows] for one in blocks], dtype=torch.int64).reshape(-1, 3)
    bits = np.packbits(np.concatenate([np.zeros(0, bool), *(one.written for one in blocks)]))
    return {"written_blocks": places, "written_rows": torch.from_numpy(bits)}


def _known(written: dict[str, Tensor], folder: Path) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    if not written:
        return
    try:
        bits = np.unpackbits(written["written_rows"].numpy()).astype(bool)
        for begin, number, rows in written["written_blocks"].tolist():
            yield (begin, number), bits[:rows]
            bits = bits[rows:]
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"the error memory in {folder} does not say whose labels it has: {error}") from None
