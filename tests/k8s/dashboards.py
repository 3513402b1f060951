"""Whether ConfigMaps that no pod mounts are dashboards, as Grafana's sidecar takes them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from tests.k8s.manifests import Object, of_kind, title, volumes, workloads

LABEL, WANTED = "grafana_dashboard", "1"
MAX_BYTES = 250_000
"""`kubectl apply` writes the object into an annotation of it, and all annotations together have 262,144 bytes."""


def dashboard_problems(objects: list[Object]) -> Iterator[str]:
    """ConfigMaps that nobody takes, and dashboards that Grafana would not."""
    mounted = {
        volume["configMap"]["name"]
        for workload in workloads(objects)
        for volume in volumes(workload).values()
        if "configMap" in volume
    }
    seen: Counter[str] = Counter()
    for item in of_kind(objects, "ConfigMap"):
        if item["metadata"].get("labels", {}).get(LABEL) == WANTED:
            if len(json.dumps(item)) > MAX_BYTES:
                yield f"{title(item)}: is too large for kubectl apply"
            for name, content in item["data"].items():
                uid = _uid(content) if name.endswith(".json") else None
                if uid is None:
                    yield f"{title(item)}: {name} is no dashboard"
                else:
                    seen[uid] += 1
        elif item["metadata"]["name"] not in mounted:
            yield f"{title(item)}: nobody mounts it, and it is no dashboard"
    yield from (f"dashboard {uid}: is there {count} times" for uid, count in seen.items() if count > 1)


def _uid(content: str) -> str | None:
    try:
        model = json.loads(content)
    except ValueError:
        return None
    uid = model.get("uid") if isinstance(model, dict) and model.get("panels") else None
    return uid if isinstance(uid, str) else None
