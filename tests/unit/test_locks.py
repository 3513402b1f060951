"""The two kinds of images run the same versions of everything that they have in common, each known by its hash."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LOCKS = ("requirements-cpu.lock", "requirements-cuda.lock")
OWN = re.compile(r"torch|torchvision|triton|faiss-[cg]pu|cuda-.*|nvidia-.*")
"""What one of them has otherwise, or alone."""


def locked(name: str) -> dict[str, str]:
    """Versions by package."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE))


def test_both_images_have_the_same_versions() -> None:
    cpu, cuda = ({name: version for name, version in locked(lock).items() if not OWN.fullmatch(name)} for lock in LOCKS)
    assert cpu == cuda
    assert len(cpu) > 30


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_an_image_has_its_hash(name: str) -> None:
    text = (ROOT / name).read_text()
    assert len(re.findall(r"^[\w.-]+==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)) == len(locked(name))
