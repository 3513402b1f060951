"""Each site alone, for comparison: the same method, with as many items as it sends to a federation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from feddymem.backbone import FeatureExtractor
from feddymem.comparison import alone
from feddymem.datasets import SiteData
from feddymem.evaluation import auroc
from feddymem.feature_cache import FeatureCache
from feddymem.method import Method
from feddymem.scoring import Scorer


def local_image_auroc(site: SiteData, method: Method, extractor: FeatureExtractor, folder: Path) -> float:
    """Image AUROC of a federation of this site alone, with as many items as it sends to a federation."""
    patches = FeatureCache(folder / "features", extractor).extract(site.train).patches
    bank, _ = patches.split(method.hold_out_share, method.seed)  # as in the federation
    detector = alone({site.name: bank}, method)[site.name]
    scorer = Scorer(extractor, detector.memory, detector.generator)
    scores = [scorer.inspect(extractor.read_file(image.path).pixels[None])[0].score for image in site.test]
    return auroc(np.array([image.defect for image in site.test], bool), np.array(scores))
