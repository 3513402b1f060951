"""Large images: few are decoded or drawn at once, however many threads there are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from feddymem.backbone import FeatureExtractor, PreparedImage
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import TooManyPixelsError

SMALL_PIXELS = 4 * 2**20
"""Images up to this size wait for nobody. With 16 bits, decoding takes 18 bytes a pixel: 72 MiB of such a one."""


class LargeImages:
    """Room for large images: together they have no more pixels than a single one may have.

    Args:
        most: pixels of an image, at most.
    """

    def __init__(self, most: int) -> None:
        self._most = self._left = most
        self._changed = threading.Condition()

    @contextmanager
    def room(self, pixels: int) -> Iterator[None]:
        """Has room for an image inside the block; waits for it where the image is large.

        Args:
            pixels: of the image.
        """
        taken = 0 if pixels <= SMALL_PIXELS else min(pixels, self._most)
        with self._changed:
            self._changed.wait_for(lambda: taken <= self._left)
            self._left -= taken
        try:
            yield
        finally:
            with self._changed:
                self._left += taken
                self._changed.notify_all()

    def read(self, extractor: FeatureExtractor, image: EncodedImage | RawImage) -> PreparedImage:
        """Decodes an image; a large one as soon as there is room for it.

        Raises:
            ImageError: see `FeatureExtractor.read`.
        """
        try:
            return extractor.read(image, min(SMALL_PIXELS, self._most))
        except TooManyPixelsError as error:  # nothing is decoded by then
            pixels = error.pixels
        with self.room(pixels):
            return extractor.read(image, self._most)
