"""A pod of a manifest as arguments of `podman run`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.deploy.manifest import PodSpec

DOMAIN = "feddymem.svc.cluster.local"
"""Where names of Services are looked up."""


def network_arguments(address: str, name_server: str) -> list[str]:
    """What a pod knows of the network: its own address, and whom to ask for names, in the way that Kubernetes does."""
    arguments = ["--ip", address, "--dns", name_server, "--dns-option", "ndots:5"]
    for domain in (DOMAIN, DOMAIN.partition(".")[2], DOMAIN.partition("svc.")[2]):
        arguments += ["--dns-search", domain]
    return arguments


def restrictions(user: int, group: int) -> list[str]:
    """What the security level `restricted` takes from a container; Podman's seccomp profile is on anyway."""
    return ["--user", f"{user}:{group}", "--cap-drop", "all", "--security-opt", "no-new-privileges"]


def pod_arguments(pod: str, spec: PodSpec, folders: Mapping[str, Path]) -> list[str]:
    """Arguments of `podman run` for the container of a pod, but those of its network.

    Args:
        pod: its name, which is its host name.
        spec: what it is like.
        folders: of its volumes, by name.
    """
    container = spec.container
    arguments = ["--hostname", pod, *restrictions(spec.user, spec.group), "--group-add", str(spec.fs_group)]
    # Without swap, as a kubelet has it; what the image calls a volume is none here, so that only mounts can be written.
    arguments += ["--memory", str(container.memory), "--memory-swap", str(container.memory), "--image-volume", "ignore"]
    arguments += ["--cpus", f"{container.cpus:g}"]
    if container.read_only_root:
        arguments += ["--read-only", "--read-only-tmpfs=false"]
    for name, value in container.environment.items():
        arguments += ["--env", f"{name}={value}"]
    for mount in container.mounts:
        settings = spec.volumes.get(mount.volume)
        read_only = mount.read_only or (settings is not None and settings.kind == "configMap")
        arguments += ["--volume", f"{folders[mount.volume]}:{mount.path}:{'ro' if read_only else 'rw'}"]
    if container.command:
        arguments += ["--entrypoint", container.command[0]]
    return [*arguments, container.image, *container.command[1:], *container.args]
