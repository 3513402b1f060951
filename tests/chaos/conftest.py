"""What all tests of faults compare with."""

from __future__ import annotations

import pytest

from tests.chaos.matrix import Matrix


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """With a federation that nobody disturbed."""
    return Matrix(tmp_path_factory.mktemp("matrix"))
