"""Numbers of machines that a plan reckons with. They are guesses at what is reached, not peaks; give your own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from tessera.embedding.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Hardware:
    """One rank's device and its network. GB are 1e9 bytes; us are microseconds.

    memory_gib: of one rank, for tables. memory_gb_s: of reading and writing rows. tflop_s, tflop_s_tf32, tflop_s_amp:
    of matrix products in float32, with trainer.tf32 (on GPUs), and with trainer.amp. inside_*: to ranks of the same
    host, between_*: to other hosts; *_gb_s: what one rank sends a second, *_us: what one message takes beside its
    bytes. call_us: what a collective takes to begin. host_us: as between_us, of messages that go through the host on
    GPUs too. step_us: the host's work of a step; table_us: for each table on one rank; table_many_us: where there are
    several; rank_us: for each rank (scripts/bench/exchange.py). overlaps: the device works while the host prepares.
    """

    memory_gib: float
    memory_gb_s: float
    tflop_s: float
    tflop_s_tf32: float
    tflop_s_amp: float
    inside_gb_s: float
    inside_us: float
    between_gb_s: float
    between_us: float
    call_us: float
    host_us: float
    step_us: float
    table_us: float
    table_many_us: float
    rank_us: float
    overlaps: bool = True

    def flops(self, *, tf32: bool, amp: bool) -> float:
        """Return the operations of matrix products in a second."""
        found = self.tflop_s_amp if amp else self.tflop_s_tf32 if tf32 and self.overlaps else self.tflop_s
        return found * 1e12


_H100 = Hardware(
    memory_gib=80,
    memory_gb_s=1500,  # half of a copy, as rows lie scattered
    tflop_s=40,
    tflop_s_tf32=200,
    tflop_s_amp=400,
    inside_gb_s=250,
    inside_us=1.5,
    between_gb_s=40,
    between_us=1.5,
    call_us=25,
    host_us=30,
    step_us=1500,  # launches of torch and Triton, counted without a GPU and multiplied by what one takes
    table_us=400,
    table_many_us=850,
    rank_us=0.5,
)
PRESETS = {
    # One rank on 8 cores of a host with a network of 25 Gbit/s, shared by four ranks.
    "cpu": Hardware(
        memory_gib=64,
        memory_gb_s=5,
        tflop_s=0.4,
        tflop_s_tf32=0.4,  # there is none
        tflop_s_amp=0.4,
        inside_gb_s=3,
        inside_us=20,
        between_gb_s=0.8,
        between_us=20,
        call_us=50,
        host_us=20,
        step_us=3000,  # measured with small batches of 2 and 26 tables on one core
        table_us=230,
        table_many_us=350,
        rank_us=0.5,
        overlaps=False,
    ),
    "a100": replace(
        _H100, memory_gb_s=750, tflop_s=15, tflop_s_tf32=80, tflop_s_amp=150, inside_gb_s=180, between_gb_s=20
    ),
    "h100": _H100,
    "h200": replace(_H100, memory_gib=141, memory_gb_s=2100),
}
NUMBERS = tuple(field.name for field in fields(Hardware) if field.name != "overlaps")


def hardware(preset: str, own: Iterable[str] = ()) -> Hardware:
    """Return a preset with numbers of one's own, each "key=number".

    Raises ConfigError: an unknown preset or key, with the nearest one, or no number above 0.
    """
    if preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS, f"expected {', '.join(PRESETS)}", form="{}")
        raise ConfigError(f"--device is {preset!r}{hint}")
    changes: dict[str, Any] = {}
    for one in own:
        key, _, value = one.partition("=")
        if key not in NUMBERS:
            hint = did_you_mean(key, NUMBERS, f"known: {', '.join(NUMBERS)}", form="{}")
            raise ConfigError(f"--set {one}: no such number of a device{hint}")
        try:
            changes[key] = float(value)
        except ValueError:
            changes[key] = 0.0
        if not 0 < changes[key] < float("inf"):
            raise ConfigError(f"--set {one}: found {value!r}, expected a number above 0")
    return replace(PRESETS[preset], **changes)
