"""What sites say of a candidate: what must hold of it, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping

from feddymem.calibration import Calibration, site_key
from feddymem.memory import InvalidBankError, MemoryBank
from feddymem.release_checks import HeldOut, check_release
from feddymem.v1.federation_pb2 import CalibrateRequest
from feddymem.v1.operator_pb2 import ReleaseCheck
from feddymem.v1.release_pb2 import Release
from services.aggregator.settings import FederationSettings
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import bank_from_wire
from services.runtime.errors import Refusal, invalid
from services.runtime.messages import calibration_to_message, site_calibration_from_message


def check_sketches(said: CalibrateRequest, images: int, has_base: bool) -> None:
    """Checks what a site says of a candidate.

    Args:
        said: what it says.
        images: normal images that it had when it joined.
        has_base: whether the round started from a global memory.

    Raises:
        Refusal: INVALID_ARGUMENT for what no images make, see federation.proto.
    """
    if said.HasField("base") != has_base:
        need = "needs" if has_base else "has no"
        raise invalid(
            f"round {said.round} {need} `base`, the images scored with the global memory that it started from"
        )
    held_out = len(site_calibration_from_message(said.candidate).scores)
    before = len(site_calibration_from_message(said.base).scores) if has_base else held_out
    if before != held_out:
        raise invalid(f"base is of {before} images, the candidate of {held_out}; expected the same images")
    if held_out > images:
        raise invalid(f"{held_out} images are held out; site {said.site!r} joined with {images} in all; join again")


def calibrated(
    candidate: Release, said: Mapping[str, CalibrateRequest], settings: FederationSettings, arrays: ArrayStore
) -> tuple[Release, list[ReleaseCheck]]:
    """A candidate as the release that it becomes, and what came of its checks.

    Args:
        candidate: the candidate.
        said: what each site whose bank counts says of it, by name.
        settings: of the federation.
        arrays: has the candidate's.

    Raises:
        Refusal: an array is missing, or was damaged on the disk.
    """
    sites = {site: site_calibration_from_message(each.candidate) for site, each in said.items()}
    scored = {
        site: HeldOut(calibration.scores, site_calibration_from_message(said[site].base).scores)
        for site, calibration in sites.items()
    }
    memory = _memory(candidate, arrays)
    checks = check_release(memory, scored, settings.false_alarm_rate, settings.worse_margin)
    keyed = {site_key(candidate.federation, site): calibration for site, calibration in sites.items()}
    release = Release()
    release.MergeFrom(candidate)
    release.calibration.MergeFrom(calibration_to_message(Calibration.of(keyed, settings.false_alarm_rate)))
    return release, [ReleaseCheck(name=check.name, passed=check.passed, finding=check.finding) for check in checks]


def _memory(candidate: Release, arrays: ArrayStore) -> MemoryBank | str:
    """The global memory as it will be published; or why it cannot be."""
    stored = [(manifest, arrays.read(manifest.sha256)) for manifest in candidate.arrays]
    try:
        return bank_from_wire(stored)
    except (InvalidBankError, Refusal) as error:
        return str(error)
