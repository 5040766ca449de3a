"""Codebooks of residual k-means, and the ids of prefixes.

    r_0 = x;   c_l = the centroid of level l nearest to r_(l-1);   r_l = r_(l-1) - centroid c_l       l = 1..L

Items whose codes begin alike lie close together. Each prefix c_1..c_l of an item's codes is one id, and all of them one
bag whose vectors are added up: "prefix n-grams" (arXiv 2504.02137), over codes as in arXiv 2306.08121, which takes them
from an autoencoder instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tessera.ctr.data.counter_random import mix64
from tessera.ctr.data.errors import DataError
from tessera.ctr.semantic_ids.kmeans import Workers, k_means, nearest
from tessera.embedding.errors import ConfigError

FORMAT = 1


@dataclass(frozen=True)
class Making:
    """Settings of new codebooks. sample: items of which they are made, chosen by a hash of item and seed. Raises
    ConfigError."""

    levels: int = 3
    codes: int = 256
    seed: int = 1
    normalise: bool = False
    sample: int = 200_000
    iterations: int = 25

    def __post_init__(self) -> None:
        for key, least in {"levels": 1, "codes": 2, "sample": self.codes, "iterations": 1}.items():
            if getattr(self, key) < least:
                raise ConfigError(f"--{key}: found {getattr(self, key)}, expected at least {least}")
        if self.codes > 1 << 24:
            raise ConfigError(f"--codes: found {self.codes}, expected at most {1 << 24}")


@dataclass(frozen=True)
class Codebooks:
    """centroids: of each level, float32 [codes, dim]. normalise: whether vectors are divided by their length first."""

    centroids: tuple[np.ndarray, ...]
    normalise: bool = False

    @property
    def dim(self) -> int:
        return int(self.centroids[0].shape[1])

    @property
    def levels(self) -> int:
        return len(self.centroids)

    @cached_property
    def version(self) -> str:
        """16 hex digits that follow from all centroids: other codebooks have another version."""
        digest = hashlib.blake2b(b"normalise" if self.normalise else b"", digest_size=8)
        for level in self.centroids:
            digest.update(np.array(level.shape, "<i8").tobytes() + level.astype("<f4").tobytes())
        return digest.hexdigest()

    def encode(self, x: np.ndarray, by: Workers) -> tuple[np.ndarray, np.ndarray]:
        """Return the codes int32 [n, levels] of vectors x float32 [n, dim], and the sums of the squared residuals
        before and after each level, float64 [levels + 1]."""
        residual = normalised(x) if self.normalise else x.copy()
        codes = np.empty((len(x), self.levels), np.int32)
        squares = [np.square(residual, dtype=np.float64).sum()]
        for level, centroids in enumerate(self.centroids):
            codes[:, level] = nearest(residual, centroids, by)
            residual -= centroids[codes[:, level]]
            squares.append(np.square(residual, dtype=np.float64).sum())
        return codes, np.array(squares)

    def save(self, path: Path) -> None:
        said = {"format": FORMAT, "version": self.version, "normalise": self.normalise}
        # One entry, because safetensors writes several in any order, and the same codebooks are to be the same file.
        levels = {f"level_{number}": one for number, one in enumerate(self.centroids, 1)}
        save_file(levels, path, {"codebooks": json.dumps(said)})

    @staticmethod
    def load(path: Path) -> Codebooks:
        """Read what `save` wrote. Raises DataError: no such file, or one that is not whole."""
        try:
            with safe_open(path, "numpy") as file:
                said = json.loads((file.metadata() or {}).get("codebooks", "{}"))
                levels = [file.get_tensor(f"level_{number}") for number in range(1, len(file.keys()) + 1)]
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: no codebooks: {error}") from None
        if said.get("format") != FORMAT:
            raise DataError(f"{path}: found format {said.get('format')}, expected codebooks of format {FORMAT}")
        read = Codebooks(tuple(levels), said["normalise"])
        if read.version != said["version"]:
            raise DataError(f"{path}: found version {read.version}, expected {said['version']}: the file has changed")
        return read


def make_codebooks(x: np.ndarray, making: Making, by: Workers) -> Codebooks:
    """Return codebooks of vectors x float32 [n, dim], which are in random order. The same vectors and settings make the
    same ones."""
    residual = normalised(x) if making.normalise else x.copy()
    levels = []
    for level in range(making.levels):
        centroids = k_means(residual, making.codes, making.seed * 1009 + level, making.iterations, by)
        residual -= centroids[nearest(residual, centroids, by)]
        levels.append(centroids)
    return Codebooks(tuple(levels), making.normalise)


def normalised(x: np.ndarray) -> np.ndarray:
    """Return vectors float32 [n, dim] of length 1; those of length 0 stay."""
    length = np.sqrt(np.square(x, dtype=np.float64).sum(1, keepdims=True))
    return (x / np.where(length > 0, length, 1)).astype(np.float32)


def prefix_ids(codes: np.ndarray, version: str) -> np.ndarray:
    """Return the ids of all prefixes, int64 [n, levels] of codes int32 [n, levels]:

        h_0 = the version's 64 bits;   h_l = mix64(3 mix64(h_(l-1) xor l) + mix64(c_l + 1))

    Version, level and all codes before go into an id, so ids of other codebooks or of another level are other ids.
    """
    ids = np.empty(codes.shape, np.uint64)
    before = np.full(len(codes), int(version, 16), np.uint64)
    for level in range(codes.shape[1]):
        mixed = mix64(before ^ np.uint64(level + 1)) * np.uint64(3)
        before = mix64(mixed + mix64(codes[:, level].astype(np.uint64) + np.uint64(1)))
        ids[:, level] = before
    return ids.view(np.int64)


def range_of(counts: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Return how many of `counts` are 1, 2, 3-4, 5-8, and so on."""
    exponents = np.ceil(np.log2(np.asarray(counts))).astype(int)
    found = {}
    for exponent, number in zip(*np.unique(exponents, return_counts=True), strict=True):
        first, last = (2 ** (exponent - 1) + 1 if exponent else 1), 2**exponent
        found[f"{first}" if first == last else f"{first}-{last}"] = int(number)
    return found
