"""Coverage-guided fuzzing with Atheris: of image decoding, of each RPC, and of releases.

python -m tests.fuzz.targets images -max_total_time=600   # further flags are libFuzzer's
python -m tests.fuzz.targets rpcs -max_total_time=600     # all RPCs of our services
python -m tests.fuzz.targets releases -max_total_time=600 # that an inference service is sent
python -m tests.fuzz.targets FederationService/UploadBank -runs=100000
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import atheris
import structlog
from google.protobuf.message import DecodeError

with atheris.instrument_imports(include=["feddymem", "services"]):
    from feddymem.image_data import EncodedImage
    from feddymem.images import ImageError, read
    from feddymem.v1.release_pb2 import DownloadArrayResponse, Release
    from tests.fuzz.in_process import MAX_PIXELS, InProcess
    from tests.fuzz.mutations import mangled_bytes, mangled_call
    from tests.fuzz.seeds import image_files

IMAGES, RPCS, RELEASES = "images", "rpcs", "releases"
_SIDE = 32
_LENGTH_BYTES = 4
_FLAGS = ("-timeout=30", "-max_len=40000", "-print_final_stats=1", "-verbosity=0")
_OWN_MUTATIONS = 0.5
"""The others are libFuzzer's."""


class Target(Protocol):
    """What is fuzzed."""

    def seeds(self) -> Iterable[bytes]:
        """Honest inputs."""

    def mangle(self, data: bytes, rng: random.Random) -> bytes | None:
        """An input changed as its form suggests; None if it has none any more."""

    def run(self, data: bytes) -> None:
        """Takes an input.

        Raises:
            Exception: anything but a proper refusal.
        """


class Images:
    """Decoding of image files."""

    def seeds(self) -> Iterable[bytes]:
        return image_files()

    def mangle(self, data: bytes, rng: random.Random) -> bytes | None:
        return mangled_bytes(data, rng)

    def run(self, data: bytes) -> None:
        try:
            picture = read(EncodedImage(data), MAX_PIXELS, _SIDE)
        except ImageError:
            return
        assert picture.height * picture.width <= MAX_PIXELS
        assert 0 <= picture.pixels.min() <= picture.pixels.max() <= 255


class Rpcs:
    """RPCs, each from bytes to bytes; the first byte of an input says which."""

    def __init__(self, in_process: InProcess, name: str) -> None:
        self._in_process, known = in_process, in_process.paths
        self._paths = [path for path in known if name == RPCS or path.endswith((f".{name}", f"/{name}"))]
        if not self._paths:
            raise SystemExit(f"no RPC {name}; expected one of {', '.join(known)}")

    def seeds(self) -> Iterable[bytes]:
        for number, path in enumerate(self._paths):
            for call in self._in_process.calls[path]:
                yield bytes([number]) + framed([message.SerializeToString() for message in call])

    def mangle(self, data: bytes, rng: random.Random) -> bytes | None:
        messages = self._in_process.parse(self._path(data), unframed(data[1:]))
        return data[:1] + framed(mangled_call(messages, rng)) if messages else None

    def run(self, data: bytes) -> None:
        self._in_process.call(self._path(data), unframed(data[1:]))

    def _path(self, data: bytes) -> str:
        return self._paths[data[0] % len(self._paths) if data else 0]


class Releases:
    """Releases as an inference service gets them from whoever publishes them."""

    def __init__(self, in_process: InProcess) -> None:
        self._in_process = in_process

    def seeds(self) -> Iterable[bytes]:
        for published in self._in_process.releases:
            yield framed([message.SerializeToString() for message in published])

    def mangle(self, data: bytes, rng: random.Random) -> bytes | None:
        release, *responses = unframed(data) or [b""]
        try:
            messages = [Release.FromString(release), *map(DownloadArrayResponse.FromString, responses)]
        except DecodeError:
            return None
        return framed(mangled_call(messages, rng))

    def run(self, data: bytes) -> None:
        self._in_process.receive(unframed(data))


def framed(messages: Sequence[bytes]) -> bytes:
    """A call's messages as one input, each behind its length."""
    return b"".join(len(data).to_bytes(_LENGTH_BYTES, "little") + data for data in messages)


def unframed(data: bytes) -> list[bytes]:
    """The messages of an input; the last may be cut."""
    messages = []
    while data:
        end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        messages.append(data[_LENGTH_BYTES:end])
        data = data[end:]
    return messages


@contextmanager
def _opened(name: str, folder: Path) -> Iterator[Target]:
    if name == IMAGES:
        yield Images()
        return
    in_process = InProcess(folder)
    try:
        yield Releases(in_process) if name == RELEASES else Rpcs(in_process, name)
    finally:
        in_process.close()


def main(name: str, flags: Sequence[str]) -> None:
    """Fuzzes a target until libFuzzer is told to end, or something is found."""
    with tempfile.TemporaryDirectory(prefix="feddymem-fuzz-") as text, _opened(name, folder := Path(text)) as target:
        corpus = folder / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(target.seeds()):
            (corpus / str(number)).write_bytes(seed)

        def mangle(data: bytes, most: int, seed: int) -> bytes:
            rng = random.Random(seed)  # noqa: S311 - no secret
            mangled = target.mangle(data, rng) if rng.random() < _OWN_MUTATIONS else None
            by_libfuzzer: bytes = atheris.Mutate(data, most) if mangled is None else mangled
            return by_libfuzzer[:most]

        atheris.Setup([sys.argv[0], *_FLAGS, *flags, str(corpus)], target.run, custom_mutator=mangle)
        atheris.Fuzz()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    try:
        main(sys.argv[1], sys.argv[2:])
    except SystemExit as ended:  # as `Fuzz` ends
        # libFuzzer would report a crash while the interpreter goes, with native libraries' threads still there.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)
