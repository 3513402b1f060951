"""Threads and devices, set once before anything computes."""

from __future__ import annotations

import cv2
import faiss
import joblib
import torch


def set_threads(threads: int | None) -> int:
    """Sets the thread counts of torch, faiss and OpenCV; by default to the cores that this process may use
    (a container's CPU limit counts).

    Returns:
        The number of threads.
    """
    count = threads or joblib.cpu_count()
    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)
    cv2.setNumThreads(count)
    return count
