"""What is set once for a process that computes."""

from __future__ import annotations

import subprocess
import sys

MEASURE = """
import resource, sys
import torch
from services.runtime.hardware import configure_hardware
if sys.argv[1] == "configured":
    configure_hardware(1)
def fill():
    torch.empty(64 * 2**18).fill_(1)
for _ in range(10):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(torch.get_num_threads(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def measure(how: str) -> tuple[int, int]:
    """Threads of torch, and page faults of taking 64 MiB and freeing it ten times, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, how], capture_output=True, check=True, timeout=120)
    threads, faults = done.stdout.split()
    return int(threads), int(faults)


def test_freed_memory_is_kept_for_the_next_use() -> None:
    threads, faults = measure("configured")
    _, by_default = measure("left alone")
    assert threads == 1
    assert faults * 10 < by_default
