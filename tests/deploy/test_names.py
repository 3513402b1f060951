"""The cluster's names: DNS, and what Services make of them. Without containers."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.deploy.manifest import Service
from tests.deploy.names import answer
from tests.deploy.services import Services

A, AAAA = 1, 28
ADDRESS = "127.0.0.1"


def query(name: str, kind: int = A) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", 77, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)


def parsed(reply: bytes) -> tuple[int, list[str]]:
    """Its response code and addresses."""
    identity, flags, _questions, records, _, _ = struct.unpack_from(">HHHHHH", reply)
    assert identity == 77
    last = [reply[len(reply) - 16 * (records - number) :][:16] for number in range(records)]
    return flags & 15, [socket.inet_ntoa(record[12:]) for record in last]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (query("Inference.Cluster"), (0, ["10.0.0.1", "10.0.0.2"])),
        (query("inference.cluster", AAAA), (0, [])),
        (query("example.org"), (3, [])),
    ],
)
def test_answers_name_addresses_or_say_that_there_are_none(asked: bytes, expected: tuple[int, list[str]]) -> None:
    reply = answer(asked, {"inference.cluster": ["10.0.0.1", "10.0.0.2"]}.get)
    assert parsed(reply) == expected


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Services]]:
    """Services behind which there are the pods given."""
    monkeypatch.setattr("tests.deploy.services._DNS_PORT", 0)
    started: list[Services] = []

    def open_(*ready: tuple[str, dict[str, int]]) -> Services:
        started.append(Services(ADDRESS, lambda service: list(ready)).__enter__())
        return started[-1]

    yield open_
    for services in started:
        services.__exit__(None, None, None)


def test_a_headless_service_stands_for_ready_pods_only(start: Callable[..., Services]) -> None:
    service = Service("inference", True, {}, {7072: "grpc"})
    services = start(("10.0.0.1", {}), ("10.0.0.2", {}))
    services.add(service, "")
    assert sorted(services.resolve("inference.feddymem.svc.cluster.local") or []) == ["10.0.0.1", "10.0.0.2"]
    assert services.resolve("inference") is None
    nobody = start()
    nobody.add(service, "")
    assert nobody.resolve("inference.feddymem.svc.cluster.local") is None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((ADDRESS, 0))
        return int(listener.getsockname()[1])


def test_a_service_with_an_address_leads_to_a_pod(start: Callable[..., Services]) -> None:
    with socket.create_server((ADDRESS, 0)) as pod:
        services, port = start((ADDRESS, {"grpc": pod.getsockname()[1]})), free_port()
        services.add(Service("aggregator", False, {}, {port: "grpc"}), ADDRESS)
        assert services.resolve("aggregator.feddymem.svc.cluster.local") == [ADDRESS]
        with socket.create_connection((ADDRESS, port), 5) as caller:
            there, _ = pod.accept()
            with there:
                caller.sendall(b"to the pod")
                assert there.recv(100) == b"to the pod"
                there.sendall(b"and back")
                assert caller.recv(100) == b"and back"
            assert caller.recv(100) == b""


def test_a_service_without_a_ready_pod_refuses(start: Callable[..., Services]) -> None:
    services, port = start(), free_port()
    services.add(Service("aggregator", False, {}, {port: "grpc"}), ADDRESS)
    # In this order, as the reset may come before the connection is returned.
    with pytest.raises(ConnectionResetError), socket.create_connection((ADDRESS, port), 5) as caller:
        caller.recv(100)


def test_a_name_server_is_asked_over_udp(start: Callable[..., Services]) -> None:
    services = start(("10.0.0.1", {}))
    services.add(Service("inference", True, {}, {}), "")
    with socket.socket(type=socket.SOCK_DGRAM) as caller:
        caller.settimeout(5)
        caller.sendto(query("inference.feddymem.svc.cluster.local"), services.name_server)
        assert parsed(caller.recv(512)) == (0, ["10.0.0.1"])
