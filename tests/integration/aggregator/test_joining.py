"""Who may take part."""

from __future__ import annotations

import dataclasses
from typing import Any

import grpc
import pytest

from feddymem.v1.federation_pb2 import GetStatusRequest, JoinRequest
from services.runtime.messages import feature_space_to_message
from tests.feature_spaces import SPACE
from tests.integration.aggregator.conftest import METHOD
from tests.integration.conftest import StartAggregator
from tests.integration.fake_site import TIMEOUT_SECONDS, FakeSite, make_bank
from tests.integration.refusals import refused


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


def test_a_federation_has_no_more_sites_than_allowed(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, max_sites=2, method=METHOD)
    with grpc.insecure_channel(running.grpc) as channel:
        for name in ("a", "b", "a"):
            FakeSite(channel, name).join()
        assert refused(FakeSite(channel, "c").join) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "federation 'parts' has its 2 sites; its operator can remove one, or raise max_sites (at most 1000)",
        )
