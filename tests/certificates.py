"""Certificates for tests, made as `feddymem certs` makes them."""

from __future__ import annotations

from pathlib import Path

from services.cli.certs import authority, issue
from services.runtime.identity import Role

HOSTS = ["127.0.0.1", "localhost"]


class Authority:
    """An authority of its own in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        authority(folder, days=1)

    def issue(self, role: Role, name: str, days: float = 1) -> Path:
        """A folder with a certificate for a server and client on this machine; expired where days are negative."""
        issue(self.folder, role, name, host=HOSTS, days=days)
        return self.folder / f"{role}-{name}"
