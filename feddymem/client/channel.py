"""How channels connect, spread calls, and try again.

The constants hold for every gRPC channel and server of FedDyMem.
"""

from __future__ import annotations

import json
from typing import Any

KEEPALIVE_SECONDS = 60
"""Pause between pings on an idle connection, for both ends: below the 4 minutes after which cloud load balancers cut
one, and not below half of what a server tolerates (it answers too_many_pings otherwise)."""
KEEPALIVE_TIMEOUT_SECONDS = 20
"""Wait for the answer to a ping, after which a peer counts as gone."""
RECONNECT_SECONDS = 10
"""Longest pause between gRPC's own attempts to connect, so that a restarted server is found soon."""

KEEPALIVE_OPTIONS = [
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
]
"""For both ends of a channel."""
RESOLVE_SECONDS = 5
"""Shortest pause between two looks for the addresses of a name, so that what is new behind it is found soon."""
CONNECT_OPTIONS = [
    *KEEPALIVE_OPTIONS,
    ("grpc.max_reconnect_backoff_ms", RECONNECT_SECONDS * 1000),
    ("grpc.dns_min_time_between_resolutions_ms", RESOLVE_SECONDS * 1000),
]
"""For the end that connects."""

REQUEST_ID = "feddymem-request-id"
"""Trailing metadata of every RPC: the name under which the log tells of it. Each attempt has one of its own."""
MAX_ATTEMPTS = 5
"""More is not to be had: gRPC itself stops at 5."""
_LARGEST_MESSAGE = 256 * 2**20
_SERVICE = "feddymem.v1.InspectionService"


def inspection_options(attempts: int) -> list[tuple[str, Any]]:
    """Options of a channel to the inference service.

    Args:
        attempts: how often a call is made before it fails, 1 to `MAX_ATTEMPTS`.

    Raises:
        ValueError: more or fewer attempts.
    """
    if not 1 <= attempts <= MAX_ATTEMPTS:
        raise ValueError(f"attempts is {attempts}; expected 1 to {MAX_ATTEMPTS}")
    return [
        *CONNECT_OPTIONS,
        ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
        # gRPC does not repeat a request that is larger than its buffer, which is 256 KiB without this: most images are.
        ("grpc.per_rpc_retry_buffer_size", _LARGEST_MESSAGE),
        ("grpc.service_config", json.dumps(service_config(attempts))),
    ]


def service_config(attempts: int) -> dict[str, Any]:
    """What gRPC calls a service config: calls go round all servers of the target; what may work later is tried again.

    With 5 attempts the pauses are 0.1, 0.4, 1.6 and 5 s, each up to a fifth shorter or longer: the first passes a queue
    that is full for a moment, all of them together a server that starts again within seconds. Inspection changes
    nothing, and the same feedback twice is as once, so both may be repeated. CANCELLED is what gRPC's server says, when
    it stops, of calls that have arrived and not begun; what the caller itself cancels is not repeated.
    """
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if attempts > 1:
        retry = {
            "maxAttempts": attempts,
            "initialBackoff": "0.1s",
            "maxBackoff": "5s",
            "backoffMultiplier": 4,
            "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
        }
        config["methodConfig"] = [{"name": [{"service": _SERVICE}], "retryPolicy": retry}]
    return config
