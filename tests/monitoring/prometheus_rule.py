"""The rules as the Prometheus operator takes them: `make rules` writes them, `make check` fails where they are stale.

kustomize can put a file into a ConfigMap, but not into an object. Run as a module; with the argument `write` it writes.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULES = ROOT / "monitoring" / "rules.yaml"
OBJECT = ROOT / "k8s" / "components" / "monitoring" / "prometheus-rule.yaml"
_HEAD = """\
# Made of monitoring/rules.yaml: change that one, then `make rules`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: feddymem
  labels:
    app.kubernetes.io/part-of: feddymem
spec:
"""


def generate() -> str:
    """The object, as YAML."""
    rules = RULES.read_text()
    return _HEAD + textwrap.indent(rules[rules.index("groups:") :], "  ")


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        OBJECT.write_text(generate())
    elif not OBJECT.exists() or OBJECT.read_text() != generate():
        sys.exit(f"stale: {OBJECT.relative_to(ROOT)}; run `make rules`")
