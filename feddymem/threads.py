"""Threads that share the cores with the one that computes."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_limits


def decoders() -> int:
    """How many threads decode beside one that computes with torch's threads: half as many, and at least two."""
    return max(2, torch.get_num_threads() // 2)


def leave_cores() -> None:
    """Makes torch compute in one thread where this one calls it; for the start of threads that decode or draw.

    OpenMP keeps a team of threads for every thread that computes. When all teams together have more threads than there
    are cores, they stop waiting for work and sleep, and every short operation has to wake them: a search took 5.7 ms
    instead of 2.5.
    """
    torch.get_num_threads()  # torch sets up a thread at its first call, and would undo a limit of before
    threadpool_limits(1, user_api="openmp")
