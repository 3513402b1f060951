"""Threads that share the cores with others.

OpenMP, torch's threads, keeps a team for every thread that computes, whose members go on spinning after each operation.
They hold the cores that OpenVINO's threads need: a copy of an image by torch before it made the backbone take 3.9 ms
instead of 2.2. And when all teams together have more threads than there are cores, they sleep at once, and every short
operation has to wake them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController


def computing_at_once() -> int:
    """How many threads may compute images at once on the CPU, the first with all cores: a core that one leaves idle,
    between two operations or waiting for memory, the other uses."""
    return max(2, torch.get_num_threads() // 4)


def workers() -> int:
    """How many threads take images from file to result, so that enough are decoded while as many as may compute do."""
    return computing_at_once() + max(1, torch.get_num_threads() // 2)


def leave_cores() -> None:
    """Makes torch compute in one thread where this one calls it; for the start of threads that decode or draw."""
    _openmp().limit(limits=1)


@contextmanager
def team(threads: int) -> Iterator[None]:
    """Makes torch compute in so many threads where this one calls it, meanwhile."""
    with _openmp().limit(limits=threads):
        yield


def _openmp() -> ThreadpoolController:
    torch.get_num_threads()  # torch sets up a thread at its first call, and would undo a limit of before
    return _loaded_openmp()


@cache
def _loaded_openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")
