"""Folders of this machine that stand for volumes, with the owners and modes that a kubelet gives them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.deploy.manifest import PodSpec


class Volumes:
    """All volumes of a run, under one folder."""

    def __init__(self, folder: Path) -> None:
        self._claims = folder / "claims"
        self._pods = folder / "pods"
        self._settings: dict[str, Mapping[str, str]] = {}

    def know(self, settings: Mapping[str, Mapping[str, str]]) -> None:
        """Adds ConfigMaps, by name."""
        self._settings.update(settings)

    def claim(self, name: str) -> Path:
        """The folder of a claim, which outlives pods; made where it is missing, owned by root as a new disk is."""
        folder = self._claims / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def of_pod(self, pod: str, spec: PodSpec, claims: Mapping[str, str]) -> dict[str, Path]:
        """The folders of a pod's volumes, ready for it.

        Args:
            pod: its name.
            spec: what it is like.
            claims: names of the claims that its workload makes for it, by volume.
        """
        folders = {name: self.claim(claim) for name, claim in claims.items()}
        self._pods.mkdir(parents=True, exist_ok=True)
        # A pod may come again under its name, with new ones.
        own = Path(tempfile.mkdtemp(prefix=f"{pod}-", dir=self._pods))
        own.chmod(0o755)
        for name, volume in spec.volumes.items():
            if volume.kind == "claim":
                folders[name] = self.claim(volume.source)
            else:
                folders[name] = own / name
                folders[name].mkdir()
            if volume.kind == "configMap":
                for file, text in self._settings[volume.source].items():
                    (folders[name] / file).write_text(text)
        for name, folder in folders.items():
            writable = name not in spec.volumes or spec.volumes[name].kind != "configMap"
            give_to_group(folder, spec.fs_group, writable)
        return folders


def give_to_group(folder: Path, group: int, writable: bool) -> None:
    """What fsGroup means: all files are the group's, new ones too, and writable for it unless the volume is not."""
    more = 0o060 if writable else 0o040
    for path in (folder, *folder.rglob("*")):
        os.chown(path, -1, group)
        path.chmod(path.stat().st_mode & 0o7777 | (more | 0o2010 if path.is_dir() else more))


def size(folder: Path) -> int:
    """Bytes of a folder's files; those that vanish meanwhile do not count."""
    total = 0
    for parent, _folders, files in os.walk(folder):
        for file in files:
            try:
                total += (Path(parent) / file).stat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total
