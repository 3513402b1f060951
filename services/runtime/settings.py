"""Settings of a service: from a YAML file, environment variables and flags, in rising precedence."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, Field, StringConstraints, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from feddymem.names import NAME_PATTERN
from feddymem.runtimes import Precision, RuntimeName

ENVIRONMENT_PREFIX = "FEDDYMEM_"
_HELP_COLUMNS = 100


class InvalidSettingsError(ValueError):
    """A setting is unknown, missing or out of range; the text names its key."""


def _host_and_port(address: str) -> str:
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65_535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return address


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


Address = Annotated[str, AfterValidator(_host_and_port)]
"""HOST:PORT."""

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""Name of a federation or site: letters, digits, '.', '_' and '-'; at most 63."""


class ServiceSettings(BaseSettings):
    """Settings that every service has. Each can be given as a YAML key, as an environment variable
    (FEDDYMEM_ and the key in capitals; `__` between nested keys), or as a flag.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: Path | None = Field(default=None, description="YAML file with these settings")
    listen: Address = Field(description="address of the gRPC server, HOST:PORT; port 0 picks a free one")
    metrics_listen: Address = Field(
        description="address of the Prometheus endpoint /metrics, HOST:PORT; port 0 picks a free one"
    )
    health_listen: Address | None = Field(
        default=None,
        description="address of another gRPC server, HOST:PORT, that says whether this service is alive and ready, and "
        "nothing else: without TLS, for probes that can show no certificate, such as Kubernetes'",
    )
    state_dir: Path = Field(description="folder for everything that must survive a restart; made if missing")
    tls_dir: Path | None = Field(
        default=None,
        description="folder with tls.crt, tls.key and ca.crt: this service's certificate, and the authority that must "
        "have issued those of all it talks to; read again for each new connection",
    )
    danger_listen_without_tls: bool = Field(
        default=False,
        description="listen without TLS on other addresses than loopback, where whoever reaches the port may do "
        "anything in anybody's name",
    )
    address_file: Path | None = Field(
        default=None, description="file to write the bound addresses to, as JSON, once the server listens (for port 0)"
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="form of log lines; auto is console on a terminal, else JSON"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="threads that compute; by default the cores that this process may use"
    )
    max_rpcs_per_second: float = Field(
        default=100,
        gt=0,
        description="RPCs that one identity or, without TLS, one address may begin in a second, on average over ten; "
        "single inspections do not count, they are refused where the queue is full",
    )
    max_open_rpcs: int = Field(
        default=256,
        ge=1,
        description="RPCs, streams above all, that one identity or address may have open; single inspections count "
        "apart, and as many more may be open as may wait",
    )
    drain_seconds: float = Field(
        default=20, ge=0, le=600, description="time for requests in flight to finish after SIGTERM, before they are cut"
    )

    @model_validator(mode="after")
    def _listen_without_tls_on_loopback_only(self) -> ServiceSettings:
        if self.tls_dir is None and not self.danger_listen_without_tls and not _is_loopback(self.listen):
            raise ValueError(
                f"listen: {self.listen} is not a loopback address, and tls_dir is not set, so that anybody could speak "
                "for any site there; set tls_dir (`feddymem certs` makes certificates for trials), or, in a network "
                "where everybody is trusted with everything, danger_listen_without_tls"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags (added in front by pydantic-settings) before environment before file."""
        return init_settings, env_settings


class ClientSettings(ServiceSettings):
    """Settings of a service that calls others."""

    aggregator: Address = Field(description="address of the aggregator, HOST:PORT")
    rpc_timeout_seconds: float = Field(
        default=30,
        gt=0,
        le=600,
        description="longest wait for the answer to a small call, after which it is tried again",
    )
    transfer_timeout_seconds: float = Field(
        default=600, gt=0, le=86_400, description="longest time for one upload or download; it resumes where it stopped"
    )
    retry_seconds: float = Field(
        default=30,
        gt=0,
        le=3600,
        description="longest pause before a broken call is tried again; pauses are random, and begin far below it",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to compute; auto is CUDA where there is one"
    )
    runtime: RuntimeName = Field(
        default="auto", description="what computes the backbone: openvino, torch, or auto for the fastest on the device"
    )
    precision: Precision = Field(
        default="float32", description="of the backbone's arithmetic; bfloat16 is faster and less exact"
    )
    checkpoint: Path | None = Field(default=None, description="safetensors file with the backbone's weights")


Settings = TypeVar("Settings", bound=ServiceSettings)


def load_settings(cls: type[Settings], args: list[str]) -> Settings:
    """Settings from flags, the environment and the YAML file that --config or FEDDYMEM_CONFIG names.

    Args:
        cls: which service's settings.
        args: command-line flags; `--help` prints all settings and exits.

    Raises:
        InvalidSettingsError: names the key, the value and what is expected.
    """
    flags: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        cls, cli_prog_name=f"feddymem {_command(cls)}", cli_parse_args=False
    )
    flags.root_parser.epilog = "\n".join(_nested_settings(cls))
    try:
        flags = flags(args=args)
        values = flags()
        path = values.get("config") or os.environ.get(f"{ENVIRONMENT_PREFIX}CONFIG")
        file = _read(cls, Path(path)) if path else None

        class FromFile(cls):  # type: ignore[valid-type, misc]
            @classmethod
            def settings_customise_sources(
                cls, settings_cls: type[BaseSettings], **sources: PydanticBaseSettingsSource
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return tuple(s for s in (flags, sources["env_settings"], file) if s is not None)

        _refuse_unknown_environment(cls)
        return cls.model_construct(**dict(FromFile()))
    except ValidationError as error:
        raise InvalidSettingsError("; ".join(_explain(e) for e in error.errors())) from error
    except SettingsError as error:
        raise InvalidSettingsError(str(error)) from error


def _nested_settings(cls: type[ServiceSettings]) -> Iterator[str]:
    """Lines that say what each of several things of a name may be set to, as YAML; flags tell nothing of that."""
    for key, field in cls.model_fields.items():
        if get_origin(field.annotation) is dict:
            _, model = get_args(field.annotation)
            yield "in the file of --config, with all that may be set, and the defaults:"
            yield from ("", f"{key}:", "  NAME:", *_as_yaml(model(), "    "))


def _as_yaml(settings: BaseModel, indent: str) -> Iterator[str]:
    for key, field in type(settings).model_fields.items():
        about = textwrap.wrap(field.description or "", _HELP_COLUMNS - len(indent) - 2)
        yield from (f"{indent}# {line}" for line in about)
        value = getattr(settings, key)
        if isinstance(value, BaseModel):
            yield f"{indent}{key}:"
            yield from _as_yaml(value, indent + "  ")
        else:
            yield f"{indent}{key}: {json.dumps(value)}"


def _command(cls: type[ServiceSettings]) -> str:
    return cls.__module__.split(".")[-2].removesuffix("_client")


def _read(cls: type[Settings], path: Path) -> YamlConfigSettingsSource:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InvalidSettingsError(f"config: {path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise InvalidSettingsError(f"config: {path} must hold `key: value` lines, not {type(content).__name__}")
    return YamlConfigSettingsSource(cls, yaml_file=path)


def _refuse_unknown_environment(cls: type[ServiceSettings]) -> None:
    known = {f"{ENVIRONMENT_PREFIX}{key.upper()}": field for key, field in cls.model_fields.items()}
    for name in sorted(os.environ):
        field = known.get(name.split("__")[0])
        nested = field is not None and get_origin(field.annotation) is dict
        if name.startswith(ENVIRONMENT_PREFIX) and (field is None or ("__" in name and not nested)):
            raise InvalidSettingsError(f"environment variable {name} is not a setting of `feddymem {_command(cls)}`")


def _explain(error: Any) -> str:
    if not error["loc"]:  # of several settings together, see `ServiceSettings`
        return str(error["ctx"]["error"])
    key = ".".join(str(part) for part in error["loc"])
    message = {"missing": "is required but not set", "extra_forbidden": "is not a known setting"}.get(
        error["type"], error["msg"]
    )
    given = "" if error["type"] in ("missing", "extra_forbidden") else f" (given: {error['input']!r})"
    return f"{key}: {message}{given}"
