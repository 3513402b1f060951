"""Settings: flag before environment before file before default, and every mistake named by its key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from feddymem.calibration import SiteCalibration
from feddymem.hold_out import MOST
from feddymem.method import Method
from feddymem.sketch import MAX_LEVEL, ScoreSketch
from feddymem.v1.calibration_pb2 import CalibratedSite, Calibration
from feddymem.v1.release_pb2 import Release
from services.aggregator.settings import MAX_SITES, AggregatorSettings, FederationSettings
from services.edge_client.settings import EdgeClientSettings
from services.inference.settings import InferenceSettings
from services.runtime.channels import MAX_ANSWER_BYTES
from services.runtime.messages import site_calibration_to_message
from services.runtime.settings import InvalidSettingsError, ServiceSettings, load_settings

NEEDED: dict[type[ServiceSettings], dict[str, Any]] = {
    AggregatorSettings: {"federations": {"magtile": {}}},
    EdgeClientSettings: {"aggregator": "hub:7070", "federation": "magtile", "site": "a", "data": "/data"},
    InferenceSettings: {"aggregator": "hub:7070"},
}
"""The settings that each service has no default for."""

SERVICES = pytest.mark.parametrize("service", NEEDED, ids=lambda service: service.__name__)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("FEDDYMEM_"):
            monkeypatch.delenv(name)


def file_with(folder: Path, content: object) -> list[str]:
    """Flags that name a YAML file of this content."""
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(content))
    return ["--config", str(path)]


def failure(service: type[ServiceSettings], args: list[str]) -> str:
    with pytest.raises(InvalidSettingsError) as caught:
        load_settings(service, args)
    return str(caught.value)


@SERVICES
def test_what_is_not_set_has_its_default(service: type[ServiceSettings], tmp_path: Path) -> None:
    settings = load_settings(service, file_with(tmp_path, NEEDED[service]))
    assert (settings.drain_seconds, settings.log_format, settings.address_file) == (20, "auto", None)
    for key, value in NEEDED[service].items():
        if isinstance(value, str):
            assert str(getattr(settings, key)) == value


@pytest.mark.parametrize(
    ("service", "key", "file", "environment", "flag"),
    [
        *[(service, "drain_seconds", 1.5, "2.5", "3.5") for service in NEEDED],
        *[(service, "listen", "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3") for service in NEEDED],
        *[(service, "state_dir", "one", "two", "three") for service in NEEDED],
        *[(service, "log_format", "console", "json", "auto") for service in NEEDED],
        *[(service, "retry_seconds", 1, "2", "3") for service in (EdgeClientSettings, InferenceSettings)],
        *[(service, "threads", 1, "2", "3") for service in (EdgeClientSettings, InferenceSettings)],
        *[(service, "device", "cpu", "auto", "cuda") for service in (EdgeClientSettings, InferenceSettings)],
        *[(service, "aggregator", "a:1", "b:2", "c:3") for service in (EdgeClientSettings, InferenceSettings)],
        (EdgeClientSettings, "site", "one", "two", "three"),
        (EdgeClientSettings, "input_size", 28, "225", "8192"),
        (EdgeClientSettings, "tile_size", 28, "224", "518"),
        (EdgeClientSettings, "tile_overlap", 0, "32", "64"),
        (EdgeClientSettings, "batch_size", 1, "2", "3"),
        (InferenceSettings, "max_batch", 1, "2", "3"),
        (InferenceSettings, "queue_size", 1, "2", "3"),
        (InferenceSettings, "max_request_bytes", 1024, "2048", "4096"),
    ],
)
def test_a_flag_comes_before_the_environment_before_the_file(
    service: type[ServiceSettings],
    key: str,
    file: object,
    environment: str,
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = file_with(tmp_path, NEEDED[service] | {key: file})
    assert str(getattr(load_settings(service, args), key)).removesuffix(".0") == str(file)
    monkeypatch.setenv(f"FEDDYMEM_{key.upper()}", environment)
    assert str(getattr(load_settings(service, args), key)).removesuffix(".0") == environment
    args += [f"--{key.replace('_', '-')}", flag]
    assert str(getattr(load_settings(service, args), key)).removesuffix(".0") == flag


@SERVICES
def test_the_environment_can_name_the_file(
    service: type[ServiceSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = file_with(tmp_path, NEEDED[service] | {"drain_seconds": 7})
    monkeypatch.setenv("FEDDYMEM_CONFIG", path)
    assert load_settings(service, []).drain_seconds == 7


@SERVICES
def test_an_unknown_key_in_the_file_is_named(service: type[ServiceSettings], tmp_path: Path) -> None:
    args = file_with(tmp_path, NEEDED[service] | {"drain_secnds": 7})
    assert failure(service, args) == "drain_secnds: is not a known setting"


@SERVICES
@pytest.mark.parametrize("name", ["FEDDYMEM_DRAIN_SECNDS", "FEDDYMEM_DRAIN__SECONDS", "FEDDYMEM_LISTEN__PORT"])
def test_an_unknown_environment_variable_is_named(
    service: type[ServiceSettings], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "7")
    assert name in failure(service, file_with(tmp_path, NEEDED[service]))


@SERVICES
def test_an_unknown_flag_is_named(
    service: type[ServiceSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(service, [*file_with(tmp_path, NEEDED[service]), "--drain-secnds", "7"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --drain-secnds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("service", "key"), [(service, key) for service, settings in NEEDED.items() for key in settings]
)
def test_a_missing_setting_is_named(service: type[ServiceSettings], key: str, tmp_path: Path) -> None:
    rest = {name: value for name, value in NEEDED[service].items() if name != key} | {"drain_seconds": 7}
    assert failure(service, file_with(tmp_path, rest)) == f"{key}: is required but not set"


def test_everything_that_is_wrong_is_named_at_once() -> None:
    text = failure(EdgeClientSettings, ["--site", "a", "--batch-size", "none", "--input-size", "27"])
    for key in ("aggregator", "federation", "data", "batch_size", "input_size"):
        assert f"{key}: " in text


@pytest.mark.parametrize(
    ("service", "key", "value"),
    [
        *[(service, "drain_seconds", value) for service in NEEDED for value in (-1, 601, "soon")],
        *[(service, "log_format", "xml") for service in NEEDED],
        *[(service, "listen", value) for service in NEEDED for value in ("7070", ":7070", "host:", "host:65536", "")],
        *[(service, "metrics_listen", "host:http") for service in NEEDED],
        (InferenceSettings, "rpc_timeout_seconds", 0),
        (InferenceSettings, "transfer_timeout_seconds", 86_401),
        (InferenceSettings, "retry_seconds", 0),
        (InferenceSettings, "threads", 0),
        (InferenceSettings, "device", "tpu"),
        (InferenceSettings, "aggregator", "hub"),
        (InferenceSettings, "max_batch", 0),
        (InferenceSettings, "queue_size", 0),
        (InferenceSettings, "max_pixels", 0),
        (InferenceSettings, "max_request_bytes", 2**31),
        (EdgeClientSettings, "input_size", 27),
        (EdgeClientSettings, "input_size", 8193),
        (EdgeClientSettings, "tile_size", 27),
        (EdgeClientSettings, "tile_size", "whole"),
        (EdgeClientSettings, "tile_overlap", -1),
        (EdgeClientSettings, "batch_size", 0),
        (EdgeClientSettings, "site", "a site"),
        (EdgeClientSettings, "site", "../a"),
        (EdgeClientSettings, "federation", "x" * 64),
        (EdgeClientSettings, "once", "perhaps"),
    ],
)
@pytest.mark.parametrize("way", ["file", "environment"])
def test_a_value_out_of_range_is_named_and_shown(
    service: type[ServiceSettings],
    key: str,
    value: object,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = dict(NEEDED[service])
    if way == "file":
        given[key] = value
    else:
        monkeypatch.setenv(f"FEDDYMEM_{key.upper()}", str(value))
    text = failure(service, file_with(tmp_path, given))
    assert text.startswith(f"{key}: ")
    assert str(value) in text


@pytest.mark.parametrize(
    "content", ["- a list", "just text", "", "key: [unclosed", "!!python/object/apply:os.getcwd []"]
)
@SERVICES
def test_a_file_that_is_no_yaml_of_settings_is_named(
    service: type[ServiceSettings], content: str, tmp_path: Path
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    text = failure(service, ["--config", str(path)])
    assert text.startswith("config: ")
    assert str(path) in text


@SERVICES
def test_a_missing_file_is_named(service: type[ServiceSettings], tmp_path: Path) -> None:
    assert "missing.yaml cannot be read" in failure(service, ["--config", str(tmp_path / "missing.yaml")])


@SERVICES
def test_settings_cannot_be_changed(service: type[ServiceSettings], tmp_path: Path) -> None:
    settings = load_settings(service, file_with(tmp_path, NEEDED[service]))
    with pytest.raises(ValueError, match="frozen"):
        settings.drain_seconds = 1


@SERVICES
def test_other_environment_variables_do_not_matter(
    service: type[ServiceSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN", "nonsense")
    monkeypatch.setenv("DRAIN_SECONDS", "nonsense")
    assert load_settings(service, file_with(tmp_path, NEEDED[service])).drain_seconds == 20


@pytest.mark.parametrize(
    ("args", "environment", "once"),
    [
        ([], None, False),
        (["--once"], None, True),
        ([], "true", True),
        (["--no-once"], "true", False),
        (["--once"], "false", True),
    ],
)
def test_a_switch_can_be_turned_on_and_off(
    args: list[str], environment: str | None, once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is not None:
        monkeypatch.setenv("FEDDYMEM_ONCE", environment)
    settings = load_settings(EdgeClientSettings, [*file_with(tmp_path, NEEDED[EdgeClientSettings]), *args])
    assert settings.once is once


def test_a_list_can_be_given_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = file_with(tmp_path, {"aggregator": "hub:1", "edge_clients": ["a:1", "b:2"]})
    assert load_settings(InferenceSettings, args).edge_clients == ("a:1", "b:2")
    monkeypatch.setenv("FEDDYMEM_EDGE_CLIENTS", '["c:3", "d:4"]')
    assert load_settings(InferenceSettings, args).edge_clients == ("c:3", "d:4")
    args += ["--edge-clients", "e:5", "--edge-clients", "f:6"]
    assert load_settings(InferenceSettings, args).edge_clients == ("e:5", "f:6")


def federations(args: list[str]) -> dict[str, Any]:
    return load_settings(AggregatorSettings, args).model_dump()["federations"]  # type: ignore[no-any-return]


def test_federations_are_nested(tmp_path: Path) -> None:
    content = {
        "magtile": {"quorum": 3, "sites": ["a", "b"], "method": {"rounds": 5, "item_type": "uint8"}},
        "brain": {"round_deadline_seconds": 60},
    }
    found = federations(file_with(tmp_path, {"federations": content}))
    assert (found["magtile"]["quorum"], found["magtile"]["sites"]) == (3, ("a", "b"))
    assert (found["magtile"]["method"]["rounds"], found["magtile"]["method"]["bank_items"]) == (5, 1568)
    assert (found["brain"]["round_deadline_seconds"], found["brain"]["quorum"]) == (60, 2)


def test_help_tells_what_a_federation_may_be_set_to_as_a_file_that_sets_just_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load_settings(AggregatorSettings, ["--help"])
    _, marker, example = capsys.readouterr().out.partition("\nfederations:\n")
    told = yaml.safe_load(marker + example.replace("NAME", "parts"))
    federation = load_settings(AggregatorSettings, file_with(tmp_path, told)).federations["parts"]
    assert federation == FederationSettings()
    assert told["federations"]["parts"].keys() == FederationSettings.model_fields.keys()
    assert told["federations"]["parts"]["method"].keys() == Method.model_fields.keys()


def test_a_release_of_as_many_sites_as_there_may_be_fits_into_a_message(tmp_path: Path) -> None:
    spread = ScoreSketch(tuple(range(-MAX_LEVEL, -MAX_LEVEL + MOST)), (1,) * MOST)
    calibration = site_calibration_to_message(SiteCalibration(spread, spread))
    site = CalibratedSite(site_sha256=bytes(32), calibration=calibration)
    assert Release(calibration=Calibration(sites=[site] * MAX_SITES)).ByteSize() < 0.9 * MAX_ANSWER_BYTES
    assert federations(file_with(tmp_path, {"federations": {"brain": {"max_sites": MAX_SITES}}}))
    with pytest.raises(InvalidSettingsError, match="max_sites"):
        federations(file_with(tmp_path, {"federations": {"brain": {"max_sites": MAX_SITES + 1}}}))


def test_the_environment_changes_one_value_of_a_federation_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = file_with(tmp_path, {"federations": {"magtile": {"quorum": 3, "method": {"rounds": 5}}, "brain": {}}})
    monkeypatch.setenv("FEDDYMEM_FEDERATIONS__MAGTILE__METHOD__BANK_ITEMS", "64")
    monkeypatch.setenv("FEDDYMEM_FEDERATIONS__MAGTILE__METHOD__GENERATOR", "true")
    monkeypatch.setenv("FEDDYMEM_FEDERATIONS__MAGTILE__SITES", '["a", "b"]')
    found = federations(args)
    assert sorted(found) == ["brain", "magtile"]
    method = found["magtile"]["method"]
    assert (method["bank_items"], method["generator"], method["rounds"]) == (64, True, 5)
    assert (found["magtile"]["quorum"], found["magtile"]["sites"]) == (3, ("a", "b"))


def test_the_environment_can_hold_whole_federations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDDYMEM_FEDERATIONS", '{"magtile": {"quorum": 4}}')
    assert federations([])["magtile"]["quorum"] == 4


def test_the_environment_makes_no_second_federation_of_one_with_capitals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is understood or refused; a federation `magtile` that nobody asked for is neither."""
    args = file_with(tmp_path, {"federations": {"MagTile": {"quorum": 3}}})
    monkeypatch.setenv("FEDDYMEM_FEDERATIONS__MagTile__QUORUM", "4")
    try:
        found = {name: federation["quorum"] for name, federation in federations(args).items()}
    except InvalidSettingsError:
        return
    assert found == {"MagTile": 4}


def test_a_flag_can_hold_a_federation(tmp_path: Path) -> None:
    args = file_with(tmp_path, {"federations": {"magtile": {"quorum": 3, "method": {"rounds": 5}}}})
    magtile = federations([*args, "--federations", '{"magtile": {"quorum": 9}}'])["magtile"]
    assert (magtile["quorum"], magtile["method"]["rounds"]) == (9, 5)


@pytest.mark.parametrize(
    ("federation", "text"),
    [
        ({"quorm": 3}, "federations.magtile.quorm: is not a known setting"),
        ({"quorum": 0}, "federations.magtile.quorum: "),
        ({"round_deadline_seconds": 0}, "federations.magtile.round_deadline_seconds: "),
        ({"sites": ["a b"]}, "federations.magtile.sites.0: "),
        ({"method": {"rounds": 0}}, "federations.magtile.method.rounds: "),
        ({"method": {"bank_items": 65_537}}, "federations.magtile.method.bank_items: "),
        ({"method": {"item_type": "int4"}}, "federations.magtile.method.item_type: "),
        ({"method": {"seed": -1}}, "federations.magtile.method.seed: "),
        ({"method": {"metric_los": True}}, "federations.magtile.method.metric_los: is not a known setting"),
    ],
)
def test_a_mistake_in_a_federation_is_named_by_its_whole_key(
    federation: dict[str, Any], text: str, tmp_path: Path
) -> None:
    assert failure(AggregatorSettings, file_with(tmp_path, {"federations": {"magtile": federation}})).startswith(text)


@pytest.mark.parametrize("name", ["a b", "-a", "", "ä", "a/b", "x" * 64])
def test_a_federation_needs_a_name_that_can_be_one(name: str, tmp_path: Path) -> None:
    text = failure(AggregatorSettings, file_with(tmp_path, {"federations": {name: {}}}))
    assert text.startswith(f"federations.{name}")


def test_no_federations_are_refused(tmp_path: Path) -> None:
    assert failure(AggregatorSettings, file_with(tmp_path, {"federations": {}})).startswith("federations: ")


def test_a_typing_error_in_nested_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = file_with(tmp_path, {"federations": {"magtile": {}}})
    monkeypatch.setenv("FEDDYMEM_FEDERATIONS__MAGTILE__QUORM", "4")
    assert failure(AggregatorSettings, args) == "federations.magtile.quorm: is not a known setting"


def test_json_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDDYMEM_FEDERATIONS", "nonsense")
    assert '"federations"' in failure(AggregatorSettings, [])


LOOPBACK = pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.0.1:0", "[::1]:1", "localhost:1"])
ELSEWHERE = pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "hub:1", "127.0.0.1.example:1"])


@SERVICES
@LOOPBACK
def test_on_loopback_no_tls_is_needed(service: type[ServiceSettings], address: str, tmp_path: Path) -> None:
    assert load_settings(service, file_with(tmp_path, {**NEEDED[service], "listen": address})).listen == address


@SERVICES
@ELSEWHERE
def test_elsewhere_nothing_listens_without_tls_unless_told_to(
    service: type[ServiceSettings], address: str, tmp_path: Path
) -> None:
    flags = file_with(tmp_path, {**NEEDED[service], "listen": address})
    text = failure(service, flags)
    assert text.startswith(f"listen: {address} is not a loopback address, and tls_dir is not set")
    assert text.endswith("danger_listen_without_tls")
    assert load_settings(service, [*flags, "--danger-listen-without-tls"]).listen == address
    assert load_settings(service, [*flags, "--tls-dir", "tls"]).tls_dir == Path("tls")
