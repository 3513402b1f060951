"""A production line in the cluster: `python line.py SERVER SITE FOLDER THREADS` sends the folder's images round and
round until SIGTERM, and prints what became of each as a line of JSON. Runs in a container, with nothing but
`feddymem.client`.
"""

from __future__ import annotations

import itertools
import json
import signal
import sys
import threading
import time
from pathlib import Path

from feddymem.client import InspectionClient, InspectionError

_stop = threading.Event()
_lock = threading.Lock()


def main(server: str, site: str, folder: str, threads: str) -> None:
    """Inspects until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: _stop.set())
    images = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    turns = itertools.cycle(images)
    with InspectionClient(server, site=site) as client:
        workers = [threading.Thread(target=_work, args=(client, turns)) for _ in range(int(threads))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()


def _work(client: InspectionClient, turns: itertools.cycle[Path]) -> None:
    while not _stop.is_set():
        with _lock:
            image = next(turns)
        began = time.monotonic()
        try:
            result = client.inspect(image)
        except InspectionError as error:
            outcome: dict[str, object] = {"error": f"{type(error).__name__}: {error}"}
        else:
            outcome = {"score": result.score, "release": result.release}
        outcome |= {"image": f"{image.parent.name}/{image.name}", "seconds": time.monotonic() - began}
        with _lock:
            sys.stdout.write(json.dumps(outcome) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
