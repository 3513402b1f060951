"""The `dev` overlay as somebody who deploys it would change it: another image, other settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from tests.k8s.manifests import K8S, Object, build

DEV = "overlays/dev"


class Overlay:
    """A copy of `k8s/` in which things can be changed.

    Attributes:
        replicas: of workloads, where they are not those of `dev`.

    Args:
        folder: for the copy; made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._builds = 0
        self.replicas: dict[str, int] = {}
        shutil.copytree(K8S, folder)

    def build(self, image: str) -> list[Object]:
        """What kustomize prints.

        Args:
            image: NAME:TAG that the manifests' `feddymem` is replaced by.
        """
        self._builds += 1
        name, _, tag = image.rpartition(":")
        folder = self._folder / "overlays" / f"build-{self._builds}"
        folder.mkdir()
        kustomization = {
            "resources": ["../dev"],
            "images": [{"name": "feddymem", "newName": name, "newTag": tag}],
            "replicas": [{"name": workload, "count": count} for workload, count in self.replicas.items()],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return build(folder)

    def set_rounds(self, rounds: int) -> None:
        """Changes how many rounds the federation has."""
        path = self._folder / DEV / "settings" / "aggregator.yaml"
        settings = yaml.safe_load(path.read_text())
        for federation in settings["federations"].values():
            federation["method"]["rounds"] = rounds
        path.write_text(yaml.safe_dump(settings))
