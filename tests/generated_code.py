"""The code that protos/ becomes: `make protos` writes it, `make check` fails where it is not that any more.

Run as a module; with the argument `write` it writes.
"""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = (Path("feddymem/v1"), Path("feddymem/openinference"))
_GIVEN = Path("feddymem/openinference/open_inference_pb2.py")
_COMMON_POOL, _OWN_POOL = "_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()"


def generate(out: Path) -> None:
    """Generates the code of all protos into a folder."""
    protos = sorted(str(path) for package in PACKAGES for path in (ROOT / "protos" / package).glob("*.proto"))
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
    # tritonclient and KServe register messages of the same names; in a pool of their own ours are in nobody's way.
    text = (out / _GIVEN).read_text()
    assert text.count(_COMMON_POOL) == 1, f"protoc generates other code than it did: {_GIVEN}"
    (out / _GIVEN).write_text(text.replace(_COMMON_POOL, _OWN_POOL))


def stale() -> list[str]:
    """Paths of generated files that are missing, different or left over."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        generate(out)
        paths = {
            path.relative_to(where)
            for where in (out, ROOT)
            for package in PACKAGES
            for path in (where / package).glob("*_pb2*.py*")
        }
        return sorted(
            str(path)
            for path in paths
            if not ((out / path).exists() and (ROOT / path).exists())
            or not filecmp.cmp(out / path, ROOT / path, shallow=False)
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        generate(ROOT)
    elif files := stale():
        sys.exit(f"stale generated code: {', '.join(files)}; run `make protos`")
