"""Coverage-guided fuzzing with Atheris, of image decoding and of each RPC.

python -m tests.fuzz.targets                                         # names of the targets
python -m tests.fuzz.targets images -max_total_time=600              # further flags are libFuzzer's
python -m tests.fuzz.targets FederationService/UploadBank -runs=100000
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["feddymem", "services"], exclude=["feddymem.v1", "feddymem.openinference"]):
    from feddymem.image_data import EncodedImage
    from feddymem.images import ImageError, read
    from services.runtime.logs import configure_logs
    from tests.fuzz.in_process import MAX_PIXELS, InProcess
    from tests.fuzz.mutations import mangled_bytes, mangled_call
    from tests.fuzz.seeds import image_files

IMAGES = "images"
_SIDE = 32
_LENGTH_BYTES = 3
_FLAGS = ("-rss_limit_mb=4096", "-timeout=30", "-max_len=40000", "-print_final_stats=1")
_OWN_MUTATIONS = 0.5
"""The others are libFuzzer's."""


def main(arguments: Sequence[str]) -> None:
    """Fuzzes one target until libFuzzer is told to end, or something is found."""
    with tempfile.TemporaryDirectory(prefix="feddymem-fuzz-") as folder:
        in_process = InProcess(Path(folder))
        paths = {path.removeprefix("/").removeprefix("feddymem.v1."): path for path in in_process.paths}
        if not arguments:
            print(IMAGES, *paths, sep="\n")
        elif arguments[0] == IMAGES:
            _fuzz(_decode, _mangle_image, image_files(), Path(folder), arguments[1:])
        else:
            path = paths[arguments[0]]
            _fuzz(*_of_rpc(in_process, path), Path(folder), arguments[1:])


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


def _decode(data: bytes) -> None:
    try:
        picture = read(EncodedImage(data), MAX_PIXELS, _SIDE)
    except ImageError:
        return
    assert picture.height * picture.width <= MAX_PIXELS
    assert 0 <= picture.pixels.min() <= picture.pixels.max() <= 255


def _mangle_image(data: bytes, most: int, seed: int) -> bytes:
    rng = random.Random(seed)  # noqa: S311 - no secret
    return _libfuzzers(data, most) if rng.random() > _OWN_MUTATIONS else mangled_bytes(data, rng)[:most]


def _of_rpc(
    in_process: InProcess, path: str
) -> tuple[Callable[[bytes], None], Callable[[bytes, int, int], bytes], list[bytes]]:
    """Target, mutations and seeds of an RPC."""

    def handle(data: bytes) -> None:
        in_process.call(path, unframed(data))

    def mangle(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)  # noqa: S311 - no secret
        messages = in_process.parse(path, unframed(data)) if rng.random() < _OWN_MUTATIONS else None
        if not messages:
            return _libfuzzers(data, most)
        return framed(mangled_call(messages, rng))[:most]

    calls = in_process.calls[path]
    return handle, mangle, [framed([message.SerializeToString() for message in call]) for call in calls]


def _libfuzzers(data: bytes, most: int) -> bytes:
    mutated: bytes = atheris.Mutate(data, most)
    return mutated


def _fuzz(
    target: Callable[[bytes], None],
    mangle: Callable[[bytes, int, int], bytes],
    seeds: Sequence[bytes],
    folder: Path,
    flags: Sequence[str],
) -> None:
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        target(seed)  # what is honest must pass
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *_FLAGS, *flags, str(corpus)], target, custom_mutator=mangle)
    atheris.Fuzz()


if __name__ == "__main__":
    configure_logs("json")
    main(sys.argv[1:])
