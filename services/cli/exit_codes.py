"""Exit codes of `feddymem`; docs/operations.md lists them."""

from __future__ import annotations

from typing import Final

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
REFUSED: Final = 3
SOME_IMAGES_FAILED: Final = 4
INTERRUPTED: Final = 130
