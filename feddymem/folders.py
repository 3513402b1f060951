"""Where this program keeps what it can make again, and where it finds what was made when it was installed."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`feddymem` in the user's folder for caches (XDG base directories)."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home
        home = Path(tempfile.gettempdir())
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "feddymem"


def installed_folder() -> Path:
    """`share/feddymem` beside the packages, for what was made when they were installed."""
    return Path(sys.prefix) / "share" / "feddymem"
