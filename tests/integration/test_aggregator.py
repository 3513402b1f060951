"""The aggregator as a process, spoken to over a socket by sites that behave, and by sites that do not."""

from __future__ import annotations

import dataclasses
import hashlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from feddymem.aggregate import aggregate
from feddymem.v1.array_pb2 import DATA_TYPE_FLOAT16, DATA_TYPE_FLOAT32
from feddymem.v1.federation_pb2 import (
    PHASE_DONE,
    PHASE_OPEN,
    PHASE_WAITING,
    GetStatusRequest,
    JoinRequest,
    UploadBankRequest,
)
from feddymem.v1.release_pb2 import DownloadArrayRequest, Release, WatchReleasesRequest
from services.demo.processes import Fleet, RunningService
from services.runtime.arrays import WireArray, bank_from_wire, bank_to_wire, chunks, encode
from services.runtime.messages import feature_space_to_message
from tests.feature_spaces import SPACE
from tests.integration.conftest import StartAggregator
from tests.integration.fake_site import TIMEOUT_SECONDS, FakeSite, make_bank

METHOD = {
    "generator": True,
    "bank_items": 30,
    "memory_items": 32,
    "rounds": 2,
    "item_type": "float16",
    "hold_out_share": 0,
}
FEDERATIONS = [f"parts-{number:02}" for number in range(21)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[grpc.Channel, Iterator[str]]]:
    """One aggregator for many tests, and a federation of its own for each of them."""
    folder = tmp_path_factory.mktemp("aggregator")
    settings = {"quorum": 2, "sites": ["a", "b"], "method": METHOD}
    config = folder / "aggregator.yaml"
    config.write_text(yaml.safe_dump({"federations": dict.fromkeys(FEDERATIONS, settings)}))
    with Fleet(folder) as fleet:
        running = fleet.start("aggregator", "aggregator", "--config", str(config))
        with grpc.insecure_channel(running.grpc) as opened:
            yield opened, iter(FEDERATIONS)


@pytest.fixture
def channel(shared: tuple[grpc.Channel, Iterator[str]]) -> grpc.Channel:
    return shared[0]


@pytest.fixture
def federation(shared: tuple[grpc.Channel, Iterator[str]]) -> str:
    """A federation that no other test uses."""
    return next(shared[1])


@pytest.fixture
def sites(channel: grpc.Channel, federation: str) -> tuple[FakeSite, FakeSite]:
    """Two sites that have joined, in an open first round."""
    a, b = FakeSite(channel, "a", federation), FakeSite(channel, "b", federation)
    a.join()
    b.join()
    a.wait_for(PHASE_OPEN, 1)
    return a, b


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details() or ""


def current_release(site: FakeSite) -> Release:
    request = WatchReleasesRequest(federations=[site.federation])
    stream = site.releases.WatchReleases(request, timeout=TIMEOUT_SECONDS)
    release = next(stream).release
    stream.cancel()
    return release


def download(site: FakeSite, sha256: bytes, offset: int = 0) -> bytes:
    request = DownloadArrayRequest(sha256=sha256, offset=offset)
    return b"".join(r.chunk.data for r in site.releases.DownloadArray(request, timeout=TIMEOUT_SECONDS))


def test_two_sites_get_one_global_memory_that_is_the_library_s(sites: tuple[FakeSite, FakeSite]) -> None:
    banks = [make_bank(seed) for seed in (1, 2)]
    for site, bank in zip(sites, banks, strict=True):
        assert site.upload(bank)[-1].HasField("accepted")
    event = sites[0].wait_for(PHASE_OPEN, 2)

    arrived = bank_from_wire((array, download(sites[0], array.sha256)) for array in event.memory.arrays)

    sent = [bank_from_wire((w.manifest, w.data) for w in bank_to_wire(bank, "float16")) for bank in banks]
    expected = aggregate([bank.placed(number, 2) for number, bank in enumerate(sent)], 32).memory
    assert event.memory.version == 1
    np.testing.assert_allclose(arrived.items, expected.items, atol=2e-3)
    np.testing.assert_array_equal(arrived.weights, expected.weights)
    release = current_release(sites[0])
    assert (release.version, release.needs_generator, release.provenance.sites) == (1, True, 2)
    assert release.feature_space.fingerprint == SPACE.fingerprint


def test_the_federation_is_done_after_its_rounds(sites: tuple[FakeSite, FakeSite]) -> None:
    for round_number in (1, 2):
        sites[0].wait_for(PHASE_OPEN, round_number)
        for seed, site in enumerate(sites):
            site.upload(make_bank(10 * round_number + seed), round_number)
    assert sites[1].wait_for(PHASE_DONE, 2).memory.version == 2
    code, text = refused(lambda: sites[0].upload(make_bank(9), 3))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "round 3" in text


def test_before_the_quorum_the_state_is_waiting(channel: grpc.Channel, federation: str) -> None:
    site = FakeSite(channel, "a", federation)
    site.join()
    assert site.wait_for(PHASE_WAITING, 1).seconds_left == 0


def test_unknown_federation_and_unlisted_site_are_refused_by_name(channel: grpc.Channel, federation: str) -> None:
    code, text = refused(FakeSite(channel, "a", "boats").join)
    assert (code, "'boats'" in text) == (grpc.StatusCode.NOT_FOUND, True)
    code, text = refused(FakeSite(channel, "stranger", federation).join)
    assert (code, "'stranger'" in text) == (grpc.StatusCode.NOT_FOUND, True)
    elsewhere = refused(FakeSite(channel, "stranger", "boats").join)
    assert elsewhere == (code, text.replace(federation, "boats"))  # whether there is such a federation is not told
    code, _ = refused(lambda: FakeSite(channel, "a", federation).rounds.GetStatus(GetStatusRequest(federation="boats")))
    assert code == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_size": 64}, "input_size: 32 against 64"),
        ({"tile_size": 16, "tile_overlap": 8}, "tile_size: 32 against 16; tile_overlap: 0 against 8"),
    ],
)
def test_another_fingerprint_is_refused_before_data_moves_and_says_what_differs(
    sites: tuple[FakeSite, FakeSite], changes: dict[str, Any], said: str
) -> None:
    stranger = sites[1].with_space(**changes)
    code, text = refused(stranger.join)
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert SPACE.fingerprint in text
    assert stranger.space.fingerprint in text
    assert said in text
    code, text = refused(lambda: stranger.upload(make_bank()))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert SPACE.fingerprint in text
    assert stranger.space.fingerprint in text


def broken(name: str, value: float) -> list[WireArray]:
    bank = make_bank()
    arrays = {n: np.array(getattr(bank, n)) for n in ("items", "weights", "spreads")}
    arrays[name].flat[3] = value
    wire = []
    for key, values in arrays.items():
        kind = DATA_TYPE_FLOAT16 if key == "items" else DATA_TYPE_FLOAT32
        data = values.astype("<f2" if key == "items" else "<f4").tobytes()
        array = encode(key, np.ones_like(values), kind)
        array.manifest.sha256 = hashlib.sha256(data).digest()
        wire.append(WireArray(array.manifest, data))
    return wire


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("items", np.nan, "NaN or infinite"),
        ("items", np.inf, "NaN or infinite"),
        ("items", 6.5e4, "float16"),
        ("weights", 0.0, "weight"),
        ("weights", 3e38, "160 patches"),
        ("spreads", -1.0, "spread"),
    ],
)
def test_values_that_no_honest_site_makes_are_refused_and_nothing_is_kept(
    sites: tuple[FakeSite, FakeSite], name: str, value: float, said: str
) -> None:
    arrays = broken(name, value)
    code, text = refused(lambda: sites[0].send(sites[0].header(arrays), arrays))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert said in text
    [damaged] = [array.manifest.sha256 for array in arrays if array.manifest.name == name]
    assert refused(lambda: download(sites[0], damaged))[0] == grpc.StatusCode.NOT_FOUND
    assert sites[0].upload(make_bank())[-1].HasField("accepted")


def test_another_element_type_or_length_is_refused_before_data_moves(sites: tuple[FakeSite, FakeSite]) -> None:
    wide = [encode("items", make_bank(5).items, DATA_TYPE_FLOAT32), *bank_to_wire(make_bank(5), "float16")[1:]]
    code, text = refused(lambda: sites[0].send_raw([UploadBankRequest(header=sites[0].header(wide))]))
    assert (code, "FLOAT32" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    mixed = [bank_to_wire(make_bank(5), "float16")[0], *bank_to_wire(make_bank(6, items=19), "float16")[1:]]
    code, text = refused(lambda: sites[0].send_raw([UploadBankRequest(header=sites[0].header(mixed))]))
    assert (code, "[19, 1]" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_a_bank_of_more_images_than_there_can_be_is_refused(sites: tuple[FakeSite, FakeSite]) -> None:
    arrays = bank_to_wire(make_bank(5), "float16")
    header = sites[0].header(arrays)
    header.images = 2**64 - 1
    code, text = refused(lambda: sites[0].send(header, arrays))
    assert (code, "18446744073709551615 images" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    header.images = 10
    sites[0].send(header, arrays)


def test_a_join_that_is_refused_leaves_no_trace(channel: grpc.Channel, federation: str) -> None:
    bad = JoinRequest(
        federation=federation,
        site="a",
        instance="x",
        feature_space=feature_space_to_message(dataclasses.replace(SPACE, backbone="bogus")),
    )
    honest = FakeSite(channel, "a", federation)
    code, text = refused(lambda: honest.rounds.Join(bad, timeout=TIMEOUT_SECONDS))
    assert (code, "0 images" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    bad.images, bad.instance = 10, ""
    assert refused(lambda: honest.rounds.Join(bad, timeout=TIMEOUT_SECONDS))[0] == grpc.StatusCode.INVALID_ARGUMENT
    honest.join()


def test_too_many_items_and_missing_arrays_are_refused(sites: tuple[FakeSite, FakeSite]) -> None:
    code, text = refused(lambda: sites[0].upload(make_bank(items=31)))
    assert (code, "at most 30" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    arrays = bank_to_wire(make_bank(), "float16")[:2]
    code, text = refused(lambda: sites[0].send(sites[0].header(arrays), arrays))
    assert (code, "spreads" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_a_bank_of_several_origins_is_refused(sites: tuple[FakeSite, FakeSite]) -> None:
    """A site speaks for itself alone."""
    code, text = refused(lambda: sites[0].upload(make_bank().placed(0, 2)))
    assert (code, "weights" in text, "[20, 1]" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True, True)


def test_a_bad_checksum_is_data_loss_and_a_second_try_succeeds(sites: tuple[FakeSite, FakeSite]) -> None:
    arrays = bank_to_wire(make_bank(), "float16")
    requests = [UploadBankRequest(header=sites[0].header(arrays))]
    for array in arrays:
        requests += [UploadBankRequest(chunk=chunk) for chunk in chunks(array.manifest.sha256, array.data)]
    damaged = [UploadBankRequest.FromString(request.SerializeToString()) for request in requests]
    damaged[1].chunk.crc32 ^= 1
    code, text = refused(lambda: sites[0].send_raw(damaged))
    assert (code, "CRC-32" in text) == (grpc.StatusCode.DATA_LOSS, True)
    assert sites[0].send_raw(requests)[-1].HasField("accepted")


def test_an_interrupted_upload_goes_on_at_its_offset(sites: tuple[FakeSite, FakeSite]) -> None:
    arrays = bank_to_wire(make_bank(77), "float16")  # no other test's: arrays are kept by content
    header = UploadBankRequest(header=sites[0].header(arrays))
    items = arrays[0]
    half = len(items.data) // 2
    first = next(chunks(items.manifest.sha256, items.data[:half]))
    code, text = refused(lambda: sites[0].send_raw([header, UploadBankRequest(chunk=first)]))
    assert (code, "items" in text) == (grpc.StatusCode.UNAVAILABLE, True)
    rest = [chunk for a in arrays[1:] for chunk in chunks(a.manifest.sha256, a.data)]
    pieces = [*chunks(items.manifest.sha256, items.data, half), *rest]
    answers = sites[0].send_raw([header, *(UploadBankRequest(chunk=chunk) for chunk in pieces)])
    assert [o.offset for o in answers[0].resume.offsets] == [half, 0, 0]
    assert answers[1].HasField("accepted")


def test_the_same_bank_twice_is_harmless_and_another_one_is_refused(sites: tuple[FakeSite, FakeSite]) -> None:
    sites[0].upload(make_bank(1))
    again = sites[0].upload(make_bank(1))
    sizes = [len(array.data) for array in bank_to_wire(make_bank(1), "float16")]
    assert [o.offset for o in again[0].resume.offsets] == sizes
    assert again[1].HasField("accepted")
    code, text = refused(lambda: sites[0].upload(make_bank(2)))
    assert (code, "'a'" in text) == (grpc.StatusCode.ALREADY_EXISTS, True)


def test_a_site_that_comes_twice_is_told_so(channel: grpc.Channel, federation: str) -> None:
    first, second = FakeSite(channel, "a", federation), FakeSite(channel, "a", federation)
    first.join()
    stream = first.watch()
    next(stream)
    code, text = refused(second.join)
    assert (code, "another edge client" in text) == (grpc.StatusCode.ALREADY_EXISTS, True)
    stream.cancel()
    deadline_join(second)
    assert refused(lambda: next(first.watch()))[0] == grpc.StatusCode.FAILED_PRECONDITION


def deadline_join(site: FakeSite) -> None:
    """Joins as soon as the aggregator has noticed that the other edge client has gone."""
    for _ in range(10_000):
        try:
            return site.join()
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.ALREADY_EXISTS  # noqa: PT017
    raise AssertionError("the aggregator never noticed that the stream was gone")


def test_a_round_closes_by_its_deadline_and_a_late_bank_is_told_so(start_aggregator: StartAggregator) -> None:
    aggregator = start_aggregator(quorum=1, sites=["a", "b"], round_deadline_seconds=0.5, method=METHOD)
    with grpc.insecure_channel(aggregator.grpc) as channel:
        quick, slow = FakeSite(channel, "a"), FakeSite(channel, "b")
        quick.join()
        slow.join()
        quick.wait_for(PHASE_OPEN, 1)
        quick.upload(make_bank(1))
        slow.wait_for(PHASE_OPEN, 2)
        code, text = refused(lambda: slow.upload(make_bank(2)))
        assert (code, "round 1" in text, "next round" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True, True)
        assert slow.upload(make_bank(2), 2)[-1].HasField("accepted")


def test_a_site_that_comes_late_is_an_origin_behind_those_known(start_aggregator: StartAggregator) -> None:
    """Although its name comes first; what the memory has of the others stays theirs."""
    settings = METHOD | {"memory_items": 100, "rounds": 2}
    aggregator = start_aggregator(quorum=1, sites=["a", "b"], round_deadline_seconds=0.5, method=settings)
    early, late = make_bank(1), make_bank(2)
    with grpc.insecure_channel(aggregator.grpc) as channel:
        b, a = FakeSite(channel, "b"), FakeSite(channel, "a")
        a.join()
        b.join()
        b.wait_for(PHASE_OPEN, 1)
        b.upload(early)
        a.wait_for(PHASE_OPEN, 2)
        a.upload(late, 2)
        arrays = a.wait_for(PHASE_DONE, 2).memory.arrays
        memory = bank_from_wire((array, download(a, array.sha256)) for array in arrays)
    np.testing.assert_array_equal(memory.weights[: len(early)], early.placed(0, 2).weights)
    np.testing.assert_array_equal(memory.weights[len(early) :], late.placed(1, 2).weights)


def test_a_deadline_without_a_quorum_does_not_close_the_round(start_aggregator: StartAggregator) -> None:
    aggregator = start_aggregator(quorum=2, round_deadline_seconds=0.1, method=METHOD)
    with grpc.insecure_channel(aggregator.grpc) as channel:
        a, b = FakeSite(channel, "a"), FakeSite(channel, "b")
        a.join()
        b.join()
        a.wait_for(PHASE_OPEN, 1)
        a.upload(make_bank(1))
        assert b.upload(make_bank(2))[-1].HasField("accepted")
        b.wait_for(PHASE_OPEN, 2)


def test_killed_and_restarted_the_round_goes_on_where_it_was(
    fleet: Fleet, start_aggregator: StartAggregator, tmp_path: Any
) -> None:
    running = start_aggregator(quorum=2, sites=["a", "b"], method=METHOD)
    with grpc.insecure_channel(running.grpc) as channel:
        a = FakeSite(channel, "a")
        b = FakeSite(channel, "b")
        a.join()
        b.join()
        a.wait_for(PHASE_OPEN, 1)
        a.upload(make_bank(1))
    fleet.kill("aggregator", signal.SIGKILL)
    running = start_aggregator(quorum=2, sites=["a", "b"], method=METHOD)
    with grpc.insecure_channel(running.grpc) as channel:
        stub = FakeSite(channel, "b")
        stub.instance = b.instance
        status = stub.rounds.GetStatus(GetStatusRequest(), timeout=TIMEOUT_SECONDS).federations[0]
        assert (status.phase, status.round, status.sites[0].last_round) == (PHASE_OPEN, 1, 1)
        stub.upload(make_bank(2))
        assert stub.wait_for(PHASE_OPEN, 2).memory.version == 1


def test_several_federations_do_not_mix(fleet: Fleet, tmp_path: Any) -> None:
    config = tmp_path / "two.yaml"
    config.write_text("federations: {parts: &one {quorum: 1, method: {rounds: 1, hold_out_share: 0}}, scans: *one}\n")
    running = fleet.start("aggregator", "aggregator", "--config", str(config))
    with grpc.insecure_channel(running.grpc) as channel:
        parts = FakeSite(channel, "a")
        scans = FakeSite(channel, "a", "scans", dataclasses.replace(SPACE, input_size=64))
        for site in (parts, scans):
            site.join()
            site.wait_for(PHASE_OPEN, 1)
        parts.upload(make_bank(1), item_type="uint8")
        parts.wait_for(PHASE_DONE, 1)
        assert not current_release(parts).needs_generator
        status = scans.rounds.GetStatus(GetStatusRequest(federation="scans"), timeout=TIMEOUT_SECONDS).federations[0]
        assert (status.phase, status.release) == (PHASE_OPEN, 0)


def full_disk_for(running: RunningService, store: str, sha256: bytes) -> Path:
    """A part of an array that is /dev/full: writing it fails as on a full disk, until it is removed."""
    link = running.log.parent / "state" / store / f"{sha256.hex()}.part"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("/dev/full")
    return link


def test_what_does_not_fit_on_the_disk_is_refused_and_taken_when_it_does(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, sites=["a"], method=METHOD)
    bank = make_bank()
    items = bank_to_wire(bank, "float16")[0].manifest
    full = full_disk_for(running, "banks/parts/a", items.sha256)
    with grpc.insecure_channel(running.grpc) as channel:
        site = FakeSite(channel, "a")
        site.join()
        code, text = refused(lambda: site.upload(bank))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert text.startswith("the disk of this service is full")
        assert "disk_full" in running.log.read_text()
        full.unlink()
        assert site.upload(bank)[-1].HasField("accepted")
        site.wait_for(PHASE_OPEN, 2)


def test_a_release_that_does_not_fit_on_the_disk_is_made_when_it_does(
    start_aggregator: StartAggregator, fleet: Fleet
) -> None:
    """What the release is made of is known from another aggregator, which had room."""

    def release_of(running: RunningService, meanwhile: Callable[[], None]) -> Release:
        with grpc.insecure_channel(running.grpc) as channel:
            sites = [FakeSite(channel, name) for name in ("a", "b")]
            for site in sites:
                site.join()
            sites[0].wait_for(PHASE_OPEN, 1)
            for seed, site in enumerate(sites):
                assert site.upload(make_bank(seed))[-1].HasField("accepted")
            meanwhile()
            sites[0].wait_for(PHASE_OPEN, 2)
            return current_release(sites[0])

    settings = {"sites": ["a", "b"], "method": METHOD}
    expected = release_of(start_aggregator("roomy", **settings), lambda: None)
    running = start_aggregator("full", **settings)
    full = full_disk_for(running, "releases", expected.arrays[0].sha256)
    failed = '"event": "aggregation_failed"'

    def make_room() -> None:
        fleet.wait_until(lambda: failed in running.log.read_text(), TIMEOUT_SECONDS, "the release not to fit")
        full.unlink(missing_ok=True)

    assert release_of(running, make_room).arrays == expected.arrays
    assert running.log.read_text().count(failed) == 1


def test_a_federation_has_no_more_sites_than_allowed(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, max_sites=2, method=METHOD)
    with grpc.insecure_channel(running.grpc) as channel:
        for name in ("a", "b", "a"):
            FakeSite(channel, name).join()
        assert refused(FakeSite(channel, "c").join) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "federation 'parts' has its 2 sites; its operator can raise max_sites",
        )
