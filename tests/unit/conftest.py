"""Fixtures of the unit tests."""

from __future__ import annotations

import hypothesis
import pytest

from feddymem.backbone import FeatureExtractor, load_extractor

# The same examples on every run and machine, and no file left behind.
hypothesis.settings.register_profile("unit", derandomize=True, deadline=None, database=None, max_examples=60)
# Others on each run, and many, with --hypothesis-profile explore; not in CI.
hypothesis.settings.register_profile("explore", deadline=None, database=None, max_examples=5000)
hypothesis.settings.load_profile("unit")


@pytest.fixture(scope="session")
def extractor() -> FeatureExtractor:
    return load_extractor(device="cpu")


@pytest.fixture(scope="session")
def small() -> FeatureExtractor:
    """The embedded backbone at a small input size: 8 x 8 patches."""
    return load_extractor(input_size=64, device="cpu")
