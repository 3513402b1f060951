"""Threads and memory, set once before anything computes."""

from __future__ import annotations

import ctypes

import cv2
import joblib
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Names of glibc's mallopt(3)."""
_KEPT_BYTES = 2**30


def configure_hardware(threads: int | None) -> None:
    """Sets threads and memory for a process that computes.

    Args:
        threads: of torch, and of k-means with it; None for the cores that this process may use (a container's CPU
            limit counts). OpenCV has one: images are decoded and drawn in threads of ours, and its own spin while they
            wait for work.
    """
    _keep_freed_memory()
    count = threads or joblib.cpu_count()
    torch.set_num_threads(count)
    cv2.setNumThreads(1)


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next use, in one arena for all threads.

    Torch on the CPU takes and frees the same large buffers for every batch. By default glibc gets each from the
    system and gives it back: at batch 8 the backbone then spends most of its time in page faults (23 ms an image
    instead of 8), and each thread that computes keeps an arena of its own, so that memory creeps up. Elsewhere than
    on glibc nothing is set.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _KEPT_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES)):
            mallopt(option, value)
