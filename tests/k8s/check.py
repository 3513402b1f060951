"""All that is wrong with the manifests: `python -m tests.k8s.check`, which is `make k8s-check`."""

from __future__ import annotations

import sys

from tests.k8s.certificates import certificate_problems
from tests.k8s.configuration import load_all, misfits
from tests.k8s.dashboards import dashboard_problems
from tests.k8s.manifests import K8S, OVERLAYS, BuildError, Object, build
from tests.k8s.network import network_problems
from tests.k8s.pods import pod_problems
from tests.k8s.scaling import autoscaler_problems, budget_problems, monitor_problems, replica_problems
from tests.k8s.schemas import VERSIONS, schema_problems
from tests.k8s.structure import (
    account_problems,
    kind_problems,
    name_problems,
    quantity_problems,
    reference_problems,
    selector_problems,
    service_problems,
)

TRUSTED_NETWORK = {"dev"}
"""Overlays that may do without TLS."""

_CHECKS = (
    schema_problems,
    kind_problems,
    name_problems,
    selector_problems,
    service_problems,
    reference_problems,
    account_problems,
    quantity_problems,
    pod_problems,
    replica_problems,
    budget_problems,
    autoscaler_problems,
    monitor_problems,
    dashboard_problems,
)


def problems(objects: list[Object], trusted_network: bool = False) -> list[str]:
    """All that is wrong with a build, one line each.

    Args:
        objects: the whole build.
        trusted_network: whether services may do without TLS.
    """
    loaded, found = load_all(objects)
    found += [problem for check in _CHECKS for problem in check(objects)]
    found += misfits(objects, loaded, trusted_network)
    found += certificate_problems(objects, loaded)
    found += network_problems(objects, loaded)
    return found


def main() -> int:
    """Checks all overlays; 1 where something is wrong, 0 otherwise."""
    failed = False
    for name in OVERLAYS:
        try:
            objects = build(K8S / "overlays" / name)
            found = problems(objects, trusted_network=name in TRUSTED_NETWORK)
        except BuildError as error:
            objects, found = [], [str(error)]
        failed = failed or bool(found)
        state = "wrong" if found else f"sound for Kubernetes {' and '.join(VERSIONS)}"
        sys.stdout.write(f"k8s/overlays/{name}: {len(objects)} objects, {state}\n")
        sys.stdout.writelines(f"  {problem}\n" for problem in found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
