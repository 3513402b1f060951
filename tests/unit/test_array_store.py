"""Arrays on disk: whole or not there, whatever way their chunks arrive and wherever the process dies."""

from __future__ import annotations

import hashlib
import tempfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feddymem.v1.array_pb2 import DATA_TYPE_UINT8, Array, ArrayChunk
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import CHUNK_BYTES, chunks
from services.runtime.errors import Refusal
from services.runtime.files import write_atomically

DATA = np.random.default_rng(0).bytes(100)


def manifest_of(data: bytes) -> Array:
    return Array(
        name="items",
        data_type=DATA_TYPE_UINT8,
        shape=[len(data)],
        sha256=hashlib.sha256(data).digest(),
        size_bytes=len(data),
    )


MANIFEST = manifest_of(DATA)


def piece(start: int, end: int, data: bytes = DATA) -> ArrayChunk:
    content = data[start:end]
    return ArrayChunk(sha256=MANIFEST.sha256, offset=start, data=content, crc32=zlib.crc32(content))


def send_rest(store: ArrayStore, data: bytes = DATA) -> None:
    """What a sender does that was told how much is held."""
    manifest = manifest_of(data)
    for chunk in chunks(manifest.sha256, data, store.held_bytes(manifest)):
        store.append(manifest, chunk)


@pytest.fixture
def store(tmp_path: Path) -> ArrayStore:
    return ArrayStore(tmp_path / "arrays")


@given(
    st.binary(min_size=1, max_size=60),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60), st.booleans()), max_size=12),
)
def test_any_way_of_splitting_and_repeating_chunks_gives_the_same_array(
    data: bytes, pieces: list[tuple[int, int, bool]]
) -> None:
    """Also with restarts between; a chunk that leaves a gap or overlaps is refused, and nothing of it is kept."""
    manifest = manifest_of(data)
    with tempfile.TemporaryDirectory() as folder:
        store = ArrayStore(Path(folder))
        for start, length, restart in pieces:
            if restart:
                store = ArrayStore(Path(folder))
            held = store.held_bytes(manifest)
            content = data[start % len(data) :][:length]
            chunk = ArrayChunk(offset=start % len(data), data=content, crc32=zlib.crc32(content))
            end = chunk.offset + len(content)
            refused = False
            try:
                store.append(manifest, chunk)
            except Refusal as refusal:
                refused = refusal.status == grpc.StatusCode.INVALID_ARGUMENT
            assert refused == (chunk.offset != held and end > held)
            assert store.held_bytes(manifest) == (held if refused else max(held, end))
        send_rest(store, data)
        assert ArrayStore(Path(folder)).read(manifest.sha256) == data


def test_an_array_is_not_there_until_it_is_whole(store: ArrayStore) -> None:
    store.append(MANIFEST, piece(0, 99))
    assert MANIFEST.sha256 not in store
    with pytest.raises(Refusal):
        store.read(MANIFEST.sha256)
    store.append(MANIFEST, piece(99, 100))
    assert MANIFEST.sha256 in store
    assert store.read(MANIFEST.sha256) == DATA
    assert store.held_bytes(MANIFEST) == 100


def test_a_transfer_resumes_at_the_offset_held_after_a_restart(store: ArrayStore, tmp_path: Path) -> None:
    store.append(MANIFEST, piece(0, 40))
    restarted = ArrayStore(tmp_path / "arrays")
    assert restarted.held_bytes(MANIFEST) == 40
    send_rest(restarted)
    assert restarted.read(MANIFEST.sha256) == DATA


def test_an_array_of_many_chunks_arrives(store: ArrayStore) -> None:
    data = np.random.default_rng(1).bytes(2 * CHUNK_BYTES + 9)
    send_rest(store, data)
    assert store.read(manifest_of(data).sha256) == data


def test_sending_an_array_twice_is_harmless(store: ArrayStore) -> None:
    for _ in range(2):
        for start in range(0, 100, 30):
            store.append(MANIFEST, piece(start, start + 30))
    assert store.read(MANIFEST.sha256) == DATA


def test_sending_a_chunk_twice_is_harmless(store: ArrayStore) -> None:
    for start in (0, 0, 30, 0, 30):
        store.append(MANIFEST, piece(start, start + 30))
    assert store.held_bytes(MANIFEST) == 60


def test_a_gap_is_refused_with_the_offset_to_resume_at(store: ArrayStore) -> None:
    store.append(MANIFEST, piece(0, 30))
    with pytest.raises(Refusal, match="chunk starts at 31, expected 30; resume there") as caught:
        store.append(MANIFEST, piece(31, 60))
    assert caught.value.status == grpc.StatusCode.INVALID_ARGUMENT
    assert store.held_bytes(MANIFEST) == 30


def test_bytes_behind_the_end_are_refused(store: ArrayStore) -> None:
    longer = DATA + b"!"
    store.append(MANIFEST, piece(0, 90))
    with pytest.raises(Refusal, match="chunk ends at 101, behind its 100 bytes") as caught:
        store.append(MANIFEST, piece(90, 101, longer))
    assert caught.value.status == grpc.StatusCode.INVALID_ARGUMENT
    assert store.held_bytes(MANIFEST) == 90


def test_nothing_of_a_damaged_chunk_is_kept(store: ArrayStore) -> None:
    store.append(MANIFEST, piece(0, 30))
    damaged = piece(30, 60)
    damaged.crc32 ^= 1
    with pytest.raises(Refusal) as caught:
        store.append(MANIFEST, damaged)
    assert caught.value.status == grpc.StatusCode.DATA_LOSS
    assert store.held_bytes(MANIFEST) == 30


def test_an_array_with_other_bytes_than_its_name_is_thrown_away_whole(store: ArrayStore) -> None:
    other = DATA[:50] + bytes(50)
    store.append(MANIFEST, piece(0, 50, other))
    with pytest.raises(Refusal, match="do not have the SHA-256") as caught:
        store.append(MANIFEST, piece(50, 100, other))
    assert caught.value.status == grpc.StatusCode.DATA_LOSS
    assert MANIFEST.sha256 not in store
    assert store.held_bytes(MANIFEST) == 0
    send_rest(store)
    assert store.read(MANIFEST.sha256) == DATA


def test_a_process_that_dies_within_a_chunk_leaves_a_start_to_resume_from(store: ArrayStore, tmp_path: Path) -> None:
    store.append(MANIFEST, piece(0, 60))
    (part,) = (tmp_path / "arrays").iterdir()
    part.write_bytes(DATA[:47])
    restarted = ArrayStore(tmp_path / "arrays")
    assert restarted.held_bytes(MANIFEST) == 47
    send_rest(restarted)
    assert restarted.read(MANIFEST.sha256) == DATA


def test_a_process_that_dies_between_the_last_byte_and_the_rename_loses_nothing(
    store: ArrayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def kill(_descriptor: int) -> None:
        raise KilledError

    store.append(MANIFEST, piece(0, 60))
    with monkeypatch.context() as patch:
        patch.setattr("services.runtime.array_store.os.fsync", kill)
        with pytest.raises(KilledError):
            store.append(MANIFEST, piece(60, 100))
    restarted = ArrayStore(tmp_path / "arrays")
    send_rest(restarted)
    assert MANIFEST.sha256 in restarted
    assert restarted.read(MANIFEST.sha256) == DATA


def test_an_array_that_is_put_is_there_after_a_restart(store: ArrayStore, tmp_path: Path) -> None:
    store.put(MANIFEST.sha256, DATA)
    store.put(MANIFEST.sha256, DATA)
    restarted = ArrayStore(tmp_path / "arrays")
    assert MANIFEST.sha256 in restarted
    assert restarted.read(MANIFEST.sha256) == DATA


def test_an_array_can_be_put_where_a_part_of_it_has_arrived(store: ArrayStore) -> None:
    store.append(MANIFEST, piece(0, 30))
    store.put(MANIFEST.sha256, DATA)
    assert store.read(MANIFEST.sha256) == DATA
    store.append(MANIFEST, piece(30, 60))
    assert store.read(MANIFEST.sha256) == DATA


def test_an_array_that_is_not_there_is_named(store: ArrayStore) -> None:
    with pytest.raises(Refusal, match=MANIFEST.sha256.hex()) as caught:
        store.read(MANIFEST.sha256)
    assert caught.value.status == grpc.StatusCode.NOT_FOUND
    assert store.held_bytes(MANIFEST) == 0


@pytest.mark.parametrize("end", [30, 100])
def test_a_discarded_array_is_gone(store: ArrayStore, end: int) -> None:
    store.append(MANIFEST, piece(0, end))
    store.discard(MANIFEST.sha256)
    store.discard(MANIFEST.sha256)
    assert MANIFEST.sha256 not in store
    assert store.held_bytes(MANIFEST) == 0


def test_only_wanted_arrays_and_those_on_their_way_are_kept(store: ArrayStore) -> None:
    for data in (b"one", b"two", b"three"):
        store.put(hashlib.sha256(data).digest(), data)
    store.append(MANIFEST, piece(0, 30))
    store.keep_only({hashlib.sha256(b"two").digest(), bytes(32)})
    assert [hashlib.sha256(data).digest() in store for data in (b"one", b"two", b"three")] == [False, True, False]
    assert store.held_bytes(MANIFEST) == 30


def test_a_small_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"

    def fail(_descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("services.runtime.array_store.os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"never")
    assert path.read_bytes() == b"new"


def test_two_streams_of_the_same_array_do_not_disturb_each_other(tmp_path: Path) -> None:
    for trial in range(20):
        store = ArrayStore(tmp_path / str(trial))
        together = threading.Barrier(2)

        def stream(store: ArrayStore = store, together: threading.Barrier = together) -> None:
            together.wait()
            for start in range(0, len(DATA), 7):
                store.append(MANIFEST, piece(start, min(start + 7, len(DATA))))

        with ThreadPoolExecutor(2) as pool:
            for ended in [pool.submit(stream) for _ in range(2)]:
                ended.result()
        assert store.read(MANIFEST.sha256) == DATA
