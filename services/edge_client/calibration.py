"""A site's part in calibrating a candidate: its held-out images, scored with it and with what it comes from."""

from __future__ import annotations

from feddymem.backbone import FeatureExtractor
from feddymem.generator import MemoryGenerator
from feddymem.hold_out import calibrate
from feddymem.memory import MemoryBank
from feddymem.patches import PatchSource
from feddymem.progress import Progress
from feddymem.scoring import Scorer
from feddymem.v1.federation_pb2 import CalibrateRequest
from services.runtime.messages import site_calibration_to_message


def calibration_of(
    extractor: FeatureExtractor,
    candidate: MemoryBank,
    base: MemoryBank | None,
    generator: MemoryGenerator | None,
    held_out: PatchSource | None,
    progress: Progress,
) -> CalibrateRequest:
    """What a site tells of a candidate; without the names of federation, site and candidate.

    Args:
        extractor: of the feature space.
        candidate: the global memory that the round has made.
        base: the one that it started from; None for none.
        generator: the site's memory generator of this round; None where the method has none. The base is scored
            through it, too: an approximation, because the generator has been trained since.
        held_out: patch features of the held-out images; None for none.
        progress: told what is being done.
    """
    said = CalibrateRequest()
    for memory, part in ((candidate, said.candidate), (base, said.base)):
        if memory is not None:
            scores = calibrate(Scorer(extractor, memory, generator), held_out, progress)
            part.CopyFrom(site_calibration_to_message(scores))
            part.SetInParent()  # there, though it may be empty
    return said
