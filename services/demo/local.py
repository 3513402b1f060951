"""Each site alone, for comparison: the same method, with as many items as the whole federation's global memory has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from feddymem.backbone import load_extractor
from feddymem.datasets import SiteData
from feddymem.evaluation import auroc
from feddymem.extraction import extract
from feddymem.federation import federate
from feddymem.images import decode_file
from feddymem.method import Method
from feddymem.scoring import Scorer


def local_image_auroc(site: SiteData, method: Method, folder: Path) -> float:
    """Image AUROC of a federation of this site alone, at the same memory budget: its bank may fill the global
    memory."""
    extractor = load_extractor()
    patches = extract(site.train, extractor, folder / "local.f16").patches
    alone = method.model_copy(update={"bank_items": method.memory_items})
    outcome = federate({site.name: patches}, alone)
    scorer = Scorer(extractor, outcome.memory, outcome.generators[site.name])
    scores = []
    for image in site.test:
        prepared = extractor.prepare(decode_file(image.path))
        scores.append(scorer.inspect(torch.stack([prepared]))[0].score)
    return auroc(np.array([image.defect for image in site.test], bool), np.array(scores))
