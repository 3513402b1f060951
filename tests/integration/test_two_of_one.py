"""Two at once where there should be one: streams of the same bank, processes on the same folder."""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from feddymem.v1.array_pb2 import ArrayChunk
from feddymem.v1.federation_pb2 import PHASE_OPEN, UploadBankRequest
from services.cli.exit_codes import FAILED
from services.runtime.arrays import bank_to_wire
from tests.integration.conftest import StartAggregator
from tests.integration.fake_site import TIMEOUT_SECONDS, make_bank
from tests.integration.refusals import refused
from tests.integration.test_operator import METHOD, joined


def test_a_stream_that_is_refused_takes_nothing_from_the_accepted_bank(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=2, method=METHOD)
    with joined(running, "a", "b") as (a, b):
        a.wait_for(PHASE_OPEN, 1)
        arrays = bank_to_wire(make_bank(1), "float16")
        header, waiting = a.header(arrays), queue.Queue[UploadBankRequest]()

        def stream() -> Iterator[UploadBankRequest]:
            yield UploadBankRequest(header=header)
            yield waiting.get()

        second = a.rounds.UploadBank(stream(), timeout=TIMEOUT_SECONDS)
        assert next(second).HasField("resume")
        assert a.send(header, arrays)[-1].HasField("accepted")
        waiting.put(UploadBankRequest(chunk=ArrayChunk(sha256=b"x" * 32)))
        assert refused(lambda: list(second))[0] is grpc.StatusCode.INVALID_ARGUMENT
        b.upload(make_bank(2))
        assert a.wait_for(PHASE_OPEN, 2).memory.version == 1


@pytest.mark.parametrize("service", ["aggregator", "edge", "inference"])
def test_a_folder_is_one_process_s(tmp_path: Path, service: str) -> None:
    state = tmp_path / "state"
    (tmp_path / "a.png").write_bytes(b"no image")
    own = {
        "aggregator": ["--config", str(tmp_path / "aggregator.yaml")],
        "edge": ["--aggregator", "127.0.0.1:1", "--federation", "parts", "--site", "a", "--data", str(tmp_path)],
        "inference": ["--aggregator", "127.0.0.1:1"],
    }
    (tmp_path / "aggregator.yaml").write_text("federations: {parts: {quorum: 1}}")
    holder = "from services.runtime.files import owned; from pathlib import Path; import sys\n"
    holder += "with owned(Path(sys.argv[1])): print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        command = [sys.executable, "-m", "services.cli", service, *own[service], "--state-dir", str(state)]
        listen = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
        run = subprocess.run([*command, *listen], capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == FAILED
        assert f"state_dir: {state} is in use by another process" in run.stderr
        other.kill()
