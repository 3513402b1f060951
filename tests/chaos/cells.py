"""Where a process is killed: each durable write and each point of the protocol, before and after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.federation import SITES
from tests.chaos.kill_at import KillPoint, When


@dataclass(frozen=True)
class Cell:
    """Which process dies, and how each of its lives but the last one ends."""

    process: str
    kills: tuple[KillPoint, ...]
    short: bool = False
    """Whether it is one of those that are tried on each change."""

    def __str__(self) -> str:
        return f"{self.process}: {', '.join(map(str, self.kills))}"


_STATE = "services.aggregator.state:State"
_FEDERATION = "services.aggregator.federation:Federation"
_UPLOADS = "services.aggregator.uploads:Uploads"
_RELEASES = "services.aggregator.releases:Releases"
_STORE = "services.runtime.array_store:ArrayStore"
_PUBLISHER = "services.runtime.publisher:Publisher"
_RENAME = "pathlib:Path.replace"  # before: written, but not there yet; after: there, but perhaps not for good yet
_EDGE_STATE = "services.edge_client.state:EdgeState"
_PARTICIPANT = "services.edge_client.participant:Participant"
_ROUND_WORK = "services.edge_client.round_work:RoundWork"
_FEATURES = "feddymem.feature_cache:FeatureCache"
_REGISTRY = "services.inference.registry:Registry"
_RELEASE_STORE = "services.inference.release_store:ReleaseStore"

# Numbers of calls: two sites with 5 images and banks of 5 chunks in 3 arrays, in each of two rounds.
_AGGREGATOR = {
    f"{_STATE}.set_feature_space": (1,),
    f"{_STATE}.put_site": (1, 2),
    f"{_STATE}.open_round": (1, 2),
    f"{_STATE}.put_bank": (1, 2, 3, 4),
    f"{_STATE}.put_candidate": (1, 2),
    f"{_STATE}.put_calibration": (1, 2, 3, 4),
    f"{_STATE}.put_release": (1, 2),
    f"{_STATE}.prune_release": (1,),
    f"{_STORE}.append": (1, 3, 5, 10, 17, 20),
    f"{_STORE}._finish": (1, 3, 6, 7, 9, 15),
    f"{_STORE}.put": (1, 3, 4, 6),
    f"{_STORE}.discard": (1, 3),
    f"{_STORE}.keep_only": (2, 5, 7),
    _RENAME: (2, 4, 8),  # the first one is of the address file
    f"{_PUBLISHER}.publish": (1, 2),
    f"{_FEDERATION}.join": (2,),
    f"{_FEDERATION}.check_header": (1, 4),
    f"{_FEDERATION}.accept": (1, 2, 4),
    "services.aggregator.merging:Merging.next_memory": (1, 2),
    "services.aggregator.rounds:make_release": (1, 2),
    f"{_FEDERATION}.calibrate": (1, 2, 4),
    "services.aggregator.rounds:calibrated": (1, 2),
    f"{_STATE}.set_quarantine": (1, 2),
    "services.aggregator.rounds:Rounds.forget_banks": (2, 3),
    f"{_RELEASES}.add": (1, 2),
    f"{_RELEASES}._prune": (1, 2),
    f"{_UPLOADS}.offsets": (1, 4),
    f"{_UPLOADS}.receive": (1, 4),
}
_EDGE = {
    "services.edge_client.state:write_record": (1, 2, 3),
    f"{_EDGE_STATE}.claim": (1,),
    f"{_EDGE_STATE}.put": (1, 2),
    f"{_FEATURES}._keep": (1, 3, 5),
    f"{_FEATURES}.keep_only": (1, 2, 3),
    _RENAME: (3, 6, 9),  # of features, the first ones are of the address file and of the owner
    f"{_STORE}.put": (1, 3, 5, 8),
    f"{_STORE}.keep_only": (1, 2),
    f"{_STORE}.append": (1, 3, 4),
    f"{_STORE}._finish": (1, 5),
    f"{_PUBLISHER}.publish": (1, 2),
    "services.edge_client.images:SiteImages.look": (1, 2, 3),
    "services.edge_client.arrivals:Arrivals.number": (1, 2),
    "services.edge_client.round_work:local_update": (1, 2),
    "services.edge_client.participant:upload_bank": (1, 2),
    "services.edge_client.participant:download": (1, 2, 3, 4),  # of candidates and of what rounds start from
    "services.edge_client.round_work:calibration_of": (1, 2),
    f"{_PARTICIPANT}._make_calibration": (1, 2),
    "services.edge_client.upload:chunks": (1, 2, 3, 6),  # of which the upload is half through at 2
    f"{_PARTICIPANT}._join": (1,),
    f"{_ROUND_WORK}._keep": (1, 2),
}
# Calls come in the order of RELEASES in tests/chaos/inference.py.
_INFERENCE = {
    f"{_REGISTRY}.load": (1,),
    f"{_REGISTRY}.receive": (1, 2, 3, 4),
    f"{_REGISTRY}._take": (1, 2),
    f"{_REGISTRY}._activate": (1, 2),
    "services.inference.scorers:Scorers._build": (1, 2, 3),
    f"{_REGISTRY}._forget": (1, 2, 3, 4, 5),  # the first one by `load`
    f"{_RELEASE_STORE}.open": (1, 2, 3, 4),
    f"{_RELEASE_STORE}.write": (1, 2, 3, 4),
    "services.inference.release_store:write_record": (1, 4),
    "services.runtime.following:download": (1, 2, 3, 4),
    f"{_STORE}.append": (1, 3, 9),
    f"{_STORE}._finish": (1, 4),
    f"{_STORE}.discard": (1, 3),
    _RENAME: (2, 4, 9),
}
_SHORT = {
    f"before {_STATE}.put_site 2",
    f"after {_STATE}.open_round 1",
    f"before {_STORE}.append 3",
    f"before {_STORE}._finish 3",
    f"before {_STATE}.put_bank 4",
    f"after {_STATE}.put_bank 1",
    f"after {_STATE}.put_candidate 1",
    f"before {_STATE}.put_calibration 4",
    f"after {_STATE}.put_calibration 1",
    f"before {_STATE}.put_release 1",
    f"after {_STATE}.put_release 2",
    f"after {_STATE}.prune_release 1",
    "before services.edge_client.state:write_record 3",
    "after services.edge_client.round_work:local_update 2",
    "after services.edge_client.upload:chunks 2",
    "after services.edge_client.round_work:calibration_of 2",
    f"before {_RENAME} 6",
    f"before {_PUBLISHER}.publish 2",
    f"before {_STORE}.append 4",
    f"after {_REGISTRY}._activate 2",
    f"after {_RELEASE_STORE}.write 4",
    "after services.runtime.following:download 2",
}


def all_cells() -> Iterator[Cell]:
    """Every cell of the matrix."""
    for process, points in (("aggregator", _AGGREGATOR), (SITES[0], _EDGE), ("inference", _INFERENCE)):
        for target, numbers in points.items():
            for number in numbers:
                for when in WHENS:
                    point = KillPoint(target, when, number)
                    yield Cell(process, (point,), f"{when} {target} {number}" in _SHORT)
    yield from _TWICE


WHENS: tuple[When, When] = ("before", "after")

# What a first death leaves behind is met by a second one.
_TWICE = (
    Cell(
        "aggregator",
        (KillPoint(f"{_STATE}.put_bank", "after", 1), KillPoint(f"{_STATE}.put_bank", "before", 1)),
    ),
    Cell(
        "aggregator",
        (KillPoint(f"{_STATE}.put_release", "before", 1), KillPoint(f"{_STATE}.put_release", "before", 1)),
        short=True,
    ),
    Cell(
        "aggregator",
        (KillPoint(f"{_STATE}.put_candidate", "after", 1), KillPoint(f"{_STATE}.put_calibration", "after", 1)),
        short=True,
    ),
    Cell(
        SITES[0],
        (
            KillPoint(f"{_EDGE_STATE}.put", "before", 2),
            KillPoint(f"{_EDGE_STATE}.put", "before", 1),
        ),
        short=True,
    ),
    Cell(
        "inference",
        (KillPoint(f"{_REGISTRY}._forget", "before", 5), KillPoint(f"{_REGISTRY}.load", "after", 1)),
        short=True,
    ),
)
