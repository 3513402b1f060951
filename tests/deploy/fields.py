"""Reading manifests such that no field goes unnoticed: each is understood, known to be without effect, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from tests.k8s.manifests import amount

WITHOUT_EFFECT = {
    "Kind.Namespace": "one run is one namespace; tests/k8s holds pods against its security level",
    "Kind.NetworkPolicy": "nothing enforces them here; tests/k8s/network.py says whether they allow what is needed",
    "Kind.PodDisruptionBudget": "nobody drains nodes here",
    "Kind.ServiceAccount": "there is no API server to show it to, and pods must not mount its token",
    "PersistentVolumeClaimSpec.resources": "a folder is as large as the disk",
    "PodSecurityContext.fsGroupChangePolicy": "only says when the group of a volume's files is set; it always is here",
    "PodSpec.serviceAccountName": "see Kind.ServiceAccount",
    "PodSpec.topologySpreadConstraints": "there is one node",
    "ResourceRequirements.requests": "nobody else is on the node",
}
"""What is passed over, by type of the API and field, and why it may be."""


class UnknownFieldError(Exception):
    """A manifest says something that this harness would not do."""


class Fields:
    """An object of a manifest as a context, in which its fields are read; those that nobody has read are an error.

    Args:
        value: the object.
        path: where it is, for messages.
        type_: its type in the API of Kubernetes.
    """

    def __init__(self, value: Mapping[str, Any], path: str, type_: str) -> None:
        self.path = path
        self._left = dict(value)
        self._type = type_

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unknown = sorted(key for key in self._left if f"{self._type}.{key}" not in WITHOUT_EFFECT)
        if kind is None and unknown:
            raise UnknownFieldError(f"{self.path}.{unknown[0]} is unknown to tests/deploy")

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def get(self, key: str, default: Any = None) -> Any:
        """A field, or its default."""
        return self._left.pop(key, default)

    def need(self, key: str) -> Any:
        """A field that must be there.

        Raises:
            UnknownFieldError: it is not.
        """
        if key not in self._left:
            raise UnknownFieldError(f"{self.path}.{key} is missing, which is unknown to tests/deploy")
        return self._left.pop(key)

    def only(self, key: str, *known: object, default: object = None) -> Any:
        """A field of which only some values are known.

        Raises:
            UnknownFieldError: it has another one.
        """
        value = self._left.pop(key, default)
        if value not in known:
            raise UnknownFieldError(f"{self.path}.{key}: {value} is unknown to tests/deploy")
        return value

    def quantity(self, key: str) -> float:
        """A field such as `500m` or `2Gi`, that must be there.

        Raises:
            UnknownFieldError: it is not, or is no quantity.
        """
        value = self.need(key)
        number = amount(value)
        if number is None:
            raise UnknownFieldError(f"{self.path}.{key}: {value} is no quantity")
        return number

    def inside(self, key: str, type_: str) -> Fields:
        """An object in a field; an empty one where there is none."""
        return Fields(self._left.pop(key, {}), f"{self.path}.{key}", type_)

    def each(self, key: str, type_: str) -> Iterator[Fields]:
        """The objects in the list of a field."""
        for number, value in enumerate(self._left.pop(key, [])):
            yield Fields(value, f"{self.path}.{key}[{value.get('name', number)}]", type_)


def read_all(objects: list[Fields], readers: Mapping[str, tuple[str, Callable[[Fields], None]]]) -> None:
    """Has each object read by the reader of its kind, which is for one version of the API.

    Raises:
        UnknownFieldError: there is none, and the kind is not known to be without effect; or it is of another version.
    """
    for fields in objects:
        kind = fields.need("kind")
        if kind in readers:
            version, reader = readers[kind]
            with fields:
                fields.only("apiVersion", version)
                reader(fields)
        elif f"Kind.{kind}" not in WITHOUT_EFFECT:
            raise UnknownFieldError(f"{fields.path} is of a kind unknown to tests/deploy")
