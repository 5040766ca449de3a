"""XXH64 and hexadecimal parsing in torch: strings of one length form a matrix, handled column by column."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessera.kernels.reference.bits import rotate_left, shift_right, signed

# The five primes of the XXH64 specification.
PRIME1 = signed(0x9E3779B185EBCA87)
PRIME2 = signed(0xC2B2AE3D27D4EB4F)
PRIME3 = signed(0x165667B19E3779F9)
PRIME4 = signed(0x85EBCA77C2B2AE63)
PRIME5 = signed(0x27D4EB2F165667C5)

_BYTES_AT_ONCE = 1 << 22  # the index matrix of a group takes eight times this


def xxh64(data: Tensor, offsets: Tensor) -> Tensor:
    ids = offsets.new_empty(offsets.numel() - 1)
    for rows, strings in _by_length(data, offsets):
        ids[rows] = _hash(strings)
    return ids


def hex_to_int64(data: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    ids = offsets.new_zeros(offsets.numel() - 1)
    ok = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    digit_of = torch.full((256,), -1, dtype=torch.int64, device=ids.device)
    for value, digit in enumerate("0123456789abcdef"):
        digit_of[[ord(digit), ord(digit.upper())]] = value
    for rows, strings in _by_length(data, offsets):
        length = strings.shape[1]
        if not 1 <= length <= 16:
            continue
        digits = digit_of[strings.long()]
        number = torch.zeros_like(rows)
        for column in range(length):
            number = (number << 4) | digits[:, column]
        good = (digits >= 0).all(dim=1)
        ids[rows] = torch.where(good, number, 0)
        ok[rows] = good
    return ids, ok


def _by_length(data: Tensor, offsets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows int64 [k], strings uint8 [k, length]) for every length, in pieces of bounded size."""
    starts, lengths = offsets[:-1], offsets.diff()
    if bool((lengths < 0).any()) or int(offsets[0]) < 0 or int(offsets[-1]) > data.numel():
        raise ValueError(f"offsets must not decrease and must stay inside the {data.numel()} bytes of data")
    for length in lengths.unique().tolist():
        column = torch.arange(length, device=data.device)
        for rows in (lengths == length).nonzero().flatten().split(max(1, _BYTES_AT_ONCE // max(1, length))):
            yield rows, data[starts[rows][:, None] + column]


def _round(lane: Tensor, word: Tensor) -> Tensor:
    return rotate_left(lane + word * PRIME2, 31) * PRIME1


def _words(strings: Tensor) -> Tensor:
    """Read uint8 [k, length] as int64 [k, length // 8], little-endian."""
    rows, length = strings.shape
    return strings[:, : length // 8 * 8].reshape(-1).view(torch.int64).view(rows, length // 8)


def _hash(strings: Tensor) -> Tensor:
    """Return XXH64, seed 0, of k strings of one length: uint8 [k, length] to int64 [k]."""
    rows, length = strings.shape
    words = _words(strings)
    if length >= 32:
        acc = _hash_stripes(words[:, : length // 32 * 4])
    else:
        acc = torch.full((rows,), PRIME5, dtype=torch.int64, device=strings.device)
    acc = acc + length
    for i in range(length // 32 * 4, length // 8):
        acc = rotate_left(acc ^ _round(torch.zeros_like(acc), words[:, i]), 27) * PRIME1 + PRIME4
    at = length // 8 * 8
    if length - at >= 4:
        half = strings[:, at : at + 4].reshape(-1).view(torch.int32).long() & 0xFFFFFFFF
        acc = rotate_left(acc ^ (half * PRIME1), 23) * PRIME2 + PRIME3
        at += 4
    for i in range(at, length):
        acc = rotate_left(acc ^ (strings[:, i].long() * PRIME5), 11) * PRIME1
    acc = (acc ^ shift_right(acc, 33)) * PRIME2
    acc = (acc ^ shift_right(acc, 29)) * PRIME3
    return acc ^ shift_right(acc, 32)


def _hash_stripes(words: Tensor) -> Tensor:
    """Return the state after all whole 32-byte stripes: int64 [k, 4 * stripes] to int64 [k]."""
    seeds = (PRIME1 + PRIME2, PRIME2, 0, -PRIME1)
    lanes = [torch.full_like(words[:, 0], signed(seed)) for seed in seeds]
    for i in range(0, words.shape[1], 4):
        lanes = [_round(lane, words[:, i + j]) for j, lane in enumerate(lanes)]
    first, *others = (rotate_left(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True))
    acc = sum(others, first)
    for lane in lanes:
        acc = (acc ^ _round(torch.zeros_like(lane), lane)) * PRIME1 + PRIME4
    return acc
