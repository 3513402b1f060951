"""timm, whichever build of torch it finds."""

from __future__ import annotations

import torch

__all__ = ["timm"]

try:
    import timm
except RuntimeError as error:
    # PyPI's torchvision, which timm imports, has its operators for PyPI's build of torch only. With another build (for
    # CPUs) it fails where it describes these two, which none of timm's networks uses.
    if "torchvision::nms" not in str(error):
        raise
    for _operator in ("torchvision::nms", "torchvision::qnms"):
        torch.library.define(_operator, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm
