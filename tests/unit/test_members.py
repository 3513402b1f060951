"""Which feature space a federation has, until there is something in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from feddymem.feature_space import FingerprintMismatchError
from feddymem.v1.operator_pb2 import STANDING_BANNED, STANDING_JUDGED
from services.aggregator.federation import Federation
from tests.feature_spaces import SPACE
from tests.unit.one_federation import join, opened, upload

OTHER = dataclasses.replace(SPACE, input_size=64)


def fingerprint(federation: Federation) -> str:
    return federation.status().feature_space.fingerprint


@pytest.mark.parametrize(
    "says",
    [lambda federation: federation.remove("a"), lambda federation: federation.set_standing("a", STANDING_BANNED)],
    ids=["remove", "ban"],
)
async def test_a_site_that_was_wrong_and_the_first_keeps_nobody_out_once_it_is_out_itself(
    tmp_path: Path, says: Callable[[Federation], None]
) -> None:
    with opened(tmp_path) as federation:
        join(federation, "a", space=OTHER)
        with pytest.raises(FingerprintMismatchError, match="input_size: 64 against 32"):
            join(federation, "b")
        says(federation)
    with opened(tmp_path) as federation:
        join(federation, "b")
        assert fingerprint(federation) == SPACE.fingerprint
        federation.set_standing("a", STANDING_JUDGED)
        with pytest.raises(FingerprintMismatchError, match="input_size: 32 against 64"):
            join(federation, "a", space=OTHER)


async def test_a_site_that_is_alone_comes_right_by_itself(tmp_path: Path) -> None:
    with opened(tmp_path) as federation:
        join(federation, "a", space=OTHER)
        join(federation, "a")
        join(federation, "b")
        assert fingerprint(federation) == SPACE.fingerprint


async def test_once_a_bank_is_accepted_the_feature_space_stays(tmp_path: Path) -> None:
    with opened(tmp_path) as federation:
        join(federation, "a")
        join(federation, "b")
        federation.rounds._open_round()
        await upload(federation, "a")
        federation.remove("b")
        with pytest.raises(FingerprintMismatchError):
            join(federation, "a", space=OTHER)
        federation.set_standing("a", STANDING_BANNED)
        with pytest.raises(FingerprintMismatchError):
            join(federation, "b", space=OTHER)
        federation.remove("a")
        join(federation, "b", space=OTHER)
        assert fingerprint(federation) == OTHER.fingerprint
