"""How OpenMP's threads of this process wait. Nothing here loads torch, so that it can be called before torch is."""

from __future__ import annotations

import os
import sys

_POLICY = "OMP_WAIT_POLICY"


def let_idle_threads_sleep() -> None:
    """Have OpenMP's threads sleep while they wait, here and in processes that this one starts; a set policy stays.

    Ranks share cores with each other and with decoding threads; threads that spin while they wait take those cores away
    (30 times slower steps were measured on two contended cores). OpenMP reads the policy as it loads, so this must be
    called before torch is imported.
    """
    os.environ.setdefault(_POLICY, "PASSIVE")


def restart_with_idle_threads_asleep() -> None:
    """Start this program anew, in the same process, with OpenMP's threads asleep while they wait, and return at once
    where a policy is set, as it is after that. For a program that has imported torch by now."""
    if _POLICY not in os.environ:
        let_idle_threads_sleep()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
