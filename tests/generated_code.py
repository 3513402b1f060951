"""Fails when feddymem/v1 is not what `make protos` makes of protos/; run as a module by `make check`."""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
GENERATED = Path("feddymem/v1")


def generate(out: Path) -> None:
    """Generates the code of all protos into a folder."""
    protos = sorted(str(path) for path in (ROOT / "protos" / GENERATED).glob("*.proto"))
    outputs = [
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
    ]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos"), *outputs, *protos],
        check=True,
        timeout=120,
    )


def stale() -> list[str]:
    """Names of generated files that are missing, different or left over."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, committed = Path(folder) / GENERATED, ROOT / GENERATED
        names = {path.name for where in (fresh, committed) for path in where.glob("*_pb2*.py*")}
        return sorted(
            name
            for name in names
            if not ((fresh / name).exists() and (committed / name).exists())
            or not filecmp.cmp(fresh / name, committed / name, shallow=False)
        )


if __name__ == "__main__":
    files = stale()
    if files:
        sys.exit(f"stale generated code in {GENERATED}: {', '.join(files)}; run `make protos`")
