"""Whether objects are what Kubernetes, cert-manager and the Prometheus operator take.

Kubernetes' own kinds by its schemas, of two versions: the newest that there are, and the oldest that the manifests are
for. The other kinds by schemas of ours, which know the fields that we use and no others.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
from kubernetes_validate import utils

from tests.k8s.manifests import Object, title

OLDEST = "1.31.0"
VERSIONS = utils.latest_version(), OLDEST


def _fields(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """A schema: exactly these fields."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1, "uniqueItems": True}


def _object(spec: dict[str, Any]) -> dict[str, Any]:
    labels = {"type": "object", "additionalProperties": TEXT}
    metadata = _fields({"name": TEXT}, {"namespace": TEXT, "labels": labels})
    return _fields({"apiVersion": TEXT, "kind": TEXT, "metadata": metadata, "spec": spec})


TEXT = {"type": "string", "minLength": 1}
_HOST = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"}
_DURATION = {"type": "string", "pattern": r"^\d+(h|m|s)$"}
_KEY = _fields(
    {"algorithm": {"const": "ECDSA"}, "size": {"const": 256}, "rotationPolicy": {"enum": ["Always", "Never"]}}
)
_ISSUER = _fields({"group": {"const": "cert-manager.io"}, "kind": {"enum": ["Issuer", "ClusterIssuer"]}, "name": TEXT})
_USAGES = {"enum": ["digital signature", "server auth", "client auth", "cert sign", "crl sign"]}
_CERTIFICATE = _fields(
    {"secretName": _HOST, "usages": _list(_USAGES), "privateKey": _KEY, "issuerRef": _ISSUER},
    {
        "dnsNames": _list(_HOST),
        "uris": _list({"type": "string", "pattern": r"^feddymem://[a-z]+/[A-Za-z0-9._-]+$"}),
        "commonName": TEXT,
        "isCA": {"type": "boolean"},
        "duration": _DURATION,
    },
)
_ENDPOINT = _fields({"port": TEXT, "path": {"const": "/metrics"}, "interval": _DURATION})
_SELECTOR = _fields({"matchLabels": {"type": "object", "additionalProperties": TEXT, "minProperties": 1}})
_RULE = {
    "oneOf": [
        _fields({"record": TEXT, "expr": TEXT}),
        _fields(
            {
                "alert": TEXT,
                "expr": TEXT,
                "labels": _fields({"severity": {"enum": ["page", "ticket"]}}),
                "annotations": _fields({"summary": TEXT, "runbook_url": TEXT}),
            },
            {"for": _DURATION},
        ),
    ]
}
_SCHEMAS = {
    ("cert-manager.io/v1", "Certificate"): _object(_CERTIFICATE),
    ("cert-manager.io/v1", "Issuer"): _object(
        {"oneOf": [_fields({"selfSigned": _fields({})}), _fields({"ca": _fields({"secretName": _HOST})})]}
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(
        _fields({"selector": _SELECTOR, "podMetricsEndpoints": _list(_ENDPOINT)}, {"podTargetLabels": _list(TEXT)})
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _object(
        _fields({"groups": _list(_fields({"name": TEXT, "rules": _list(_RULE)}))})
    ),
}
"""Of https://cert-manager.io/docs/reference/api-docs and https://prometheus-operator.dev/docs/api-reference/api."""


def schema_problems(objects: list[Object]) -> Iterator[str]:
    """What does not fit its schema."""
    for item in objects:
        schema = _SCHEMAS.get((item["apiVersion"], item["kind"]))
        found = (
            [_problem(json.dumps(item), version) for version in VERSIONS] if schema is None else [_own(item, schema)]
        )
        yield from (f"{title(item)}: {problem}" for problem in found if problem)


@functools.cache
def _problem(item: str, version: str) -> str | None:
    try:
        kubernetes_validate.validate(json.loads(item), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message}"
    # Only warnings to kubernetes-validate's own command line, but then nothing has been validated.
    except (
        kubernetes_validate.SchemaNotFoundError,
        kubernetes_validate.InvalidSchemaError,
        utils.VersionNotSupportedError,
    ) as error:
        return f"Kubernetes {version}: {error.message}"
    return None


def _own(item: Object, schema: dict[str, Any]) -> str | None:
    validator = jsonschema.Draft202012Validator(schema)
    first = next(iter(validator.iter_errors(item)), None)
    return f"{'.'.join(map(str, first.absolute_path))}: {first.message}" if first else None
