"""Every setting, and the only place that reads the environment.

A value comes from the variable `SUTAZAI_<NAME>`, else from the file that `SUTAZAI_<NAME>_FILE`
names, else from `$SUTAZAI_HOME/env`, which `sutazai up` writes for its embedded servers.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from sutazai.errors import ConfigurationError

PREFIX = "SUTAZAI_"
HOME_FOLDER = ".sutazai"
FLOWER_PORT = 5555

_ENCODED = "whsec_"
"""Begins a secret of callbacks that is written in base64, as Standard Webhooks does."""

_EXAMPLES = {
    "database_url": "postgresql://user:password@127.0.0.1:5432/sutazai",
    "broker_url": "redis://127.0.0.1:6379/0 or amqp://user:password@127.0.0.1:5672//",
    "redis_url": "redis://127.0.0.1:6379/0",
    "ollama_url": "http://127.0.0.1:11434",
    "callback_secret": "whsec_$(openssl rand -base64 32), or any text that has no such beginning",
    "callback_hosts": "hooks.internal,10.0.0.0/8",
    "bind": "127.0.0.1",
    "port_offset": "100",
    "ports": "hardware-resource-optimizer=9002,ai-metrics-exporter=9063",
    "concurrency": "hardware-resource-optimizer=4",
    "agents": "my_package.crawler:agent",
    "log_format": "json",
    "log_level": "info",
}


def _pairs(value: object) -> object:
    """Read `agent=number,…` into a dict; underscores in names mean hyphens."""
    if not isinstance(value, str):
        return value
    pairs = {}
    for item in filter(None, (part.strip() for part in value.split(","))):
        name, separator, number = item.partition("=")
        if not separator or not number.strip().isdigit():
            raise ValueError(f"{item!r} is not agent=number")
        pairs[name.strip().replace("_", "-")] = int(number)
    return pairs


def _names(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(filter(None, (part.strip() for part in value.split(","))))


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class _FileSource(EnvSettingsSource):
    """`SUTAZAI_<NAME>_FILE`: the value is the content of that file, as secrets are mounted."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        variable = f"{PREFIX}{field_name.upper()}_FILE"
        path = os.environ.get(variable)
        if not path:
            return None, field_name, False
        try:
            return Path(path).read_text(encoding="utf-8").strip(), field_name, False
        except OSError as error:
            raise ConfigurationError(f"{variable}: cannot read {path}: {error.strerror}.") from None


class _HomeSource(EnvSettingsSource):
    """`$SUTAZAI_HOME/env`, the addresses of the embedded servers."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        values = read_env_file(find_home() / "env")
        return values.get(f"{PREFIX}{field_name.upper()}"), field_name, False


class Settings(BaseSettings):
    """What can be configured; docs/operations.md describes each variable."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", env_ignore_empty=True)

    home: Path = Field(default_factory=lambda: find_home())  # noqa: PLW0108 - defined below
    database_url: str | None = None
    broker_url: str | None = None
    redis_url: str | None = None
    ollama_url: str = "http://127.0.0.1:11434"
    model: str = "tinyllama"
    callback_secret: str | None = None
    callback_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)] = ()
    bind: str = "127.0.0.1"
    port_offset: int = Field(default=0, ge=0, le=50_000)
    ports: Annotated[dict[str, int], NoDecode, BeforeValidator(_pairs)] = {}
    concurrency: Annotated[dict[str, int], NoDecode, BeforeValidator(_pairs)] = {}
    agents: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)] = ()
    log_format: Annotated[Literal["console", "json"], BeforeValidator(_lower)] = "console"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = (
        "info"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: the environment, files named by it, the home."""
        return (
            init_settings,
            env_settings,
            _FileSource(settings_cls),
            _HomeSource(settings_cls),
        )

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, value: str | None) -> str | None:
        return _check_url(value, ("postgresql", "postgres"))

    @field_validator("broker_url")
    @classmethod
    def _check_broker_url(cls, value: str | None) -> str | None:
        return _check_url(value, ("redis", "rediss", "sentinel", "amqp", "amqps"))

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: str | None) -> str | None:
        return _check_url(value, ("redis", "rediss"))

    @field_validator("ollama_url")
    @classmethod
    def _check_ollama_url(cls, value: str) -> str:
        return (_check_url(value, ("http", "https")) or "").rstrip("/")

    @field_validator("callback_secret")
    @classmethod
    def _check_callback_secret(cls, value: str | None) -> str | None:
        if value is not None:
            _callback_key(value)
        return value

    @field_validator("callback_hosts")
    @classmethod
    def _check_callback_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if "/" in entry:
                ipaddress.ip_network(entry)  # raises a ValueError that says what is wrong
        return value

    @field_validator("concurrency")
    @classmethod
    def _check_concurrency(cls, value: dict[str, int]) -> dict[str, int]:
        if faulty := [name for name, slots in value.items() if not 1 <= slots <= 1000]:
            raise ValueError(f"{faulty[0]} needs between 1 and 1000 slots")
        return value

    @field_validator("ports")
    @classmethod
    def _check_ports(cls, value: dict[str, int]) -> dict[str, int]:
        if faulty := [name for name, port in value.items() if not 1 <= port <= 65535]:
            raise ValueError(f"the port of {faulty[0]} is not between 1 and 65535")
        return value

    def port(self, agent: str, declared: int) -> int:
        """Return the port an agent's front listens on."""
        return self.ports.get(agent, declared + self.port_offset)

    def require_services(self) -> Settings:
        """Return these settings, or raise `ConfigurationError` when no stores are named."""
        for name in ("database_url", "broker_url"):
            if not getattr(self, name):
                raise ConfigurationError(
                    f"{PREFIX}{name.upper()} is not set and {self.home} holds no running "
                    f"installation; run `sutazai up`, or set it, for example to "
                    f"{_EXAMPLES[name]}."
                )
        return self

    @property
    def signals_url(self) -> str | None:
        """The Redis for samples, registry and signals: the broker's own when that is Redis."""
        if self.redis_url:
            return self.redis_url
        if self.broker_url and self.broker_url.startswith("redis"):
            return self.broker_url
        return None

    @property
    def callback_key(self) -> bytes:
        """What callbacks are signed with: the secret, or what its base64 after `whsec_` means."""
        return _callback_key(self.callback_secret or "")

    @property
    def host(self) -> str:
        """The name of this machine, as in worker names and hardware samples."""
        return socket.gethostname()


@cache
def settings() -> Settings:
    """Read the settings once; raises `ConfigurationError` with one line that says what is wrong."""
    try:
        return Settings()
    except SettingsError as error:
        # pydantic-settings wraps what a source raises.
        raise (error.__cause__ or ConfigurationError(str(error))) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        message = first["msg"].removeprefix("Value error, ")
        example = _EXAMPLES.get(name)
        raise ConfigurationError(
            f"{PREFIX}{name.upper()}: {message}" + (f"; for example: {example}" if example else "")
        ) from None


def override(**values: str | None) -> None:
    """Set variables for this process and its children (None removes one) and read again."""
    for name, value in values.items():
        variable = f"{PREFIX}{name.upper()}"
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value
    settings.cache_clear()


def is_given(name: str) -> bool:
    """Whether the environment itself, not the home, sets a value."""
    variable = f"{PREFIX}{name.upper()}"
    return bool(os.environ.get(variable) or os.environ.get(f"{variable}_FILE"))


def find_home() -> Path:
    """Return `SUTAZAI_HOME`, else the nearest `.sutazai`, the last one started, `./.sutazai`."""
    if explicit := os.environ.get(f"{PREFIX}HOME"):
        return Path(explicit).expanduser().absolute()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / HOME_FOLDER).is_dir():
            return folder / HOME_FOLDER
    try:
        last = Path(_last_home_file().read_text(encoding="utf-8").strip())
    except OSError:
        last = None
    return last if last and last.is_dir() else here / HOME_FOLDER


def prepare_flower() -> None:
    """Give Flower its defaults: our address and port, and an open API on loopback.

    Raises `ConfigurationError` when it would be open to others.
    """
    own = settings()
    os.environ.setdefault("FLOWER_ADDRESS", own.bind)
    os.environ.setdefault("FLOWER_PORT", str(FLOWER_PORT + own.port_offset))
    if _is_loopback(os.environ["FLOWER_ADDRESS"]):
        # Flower closes its API unless it is told that open is meant.
        os.environ.setdefault("FLOWER_UNAUTHENTICATED_API", "true")
    elif not os.environ.get("FLOWER_BASIC_AUTH") and not (
        os.environ.get("FLOWER_AUTH") and os.environ.get("FLOWER_AUTH_PROVIDER")
    ):
        raise ConfigurationError(
            f"SUTAZAI_BIND: Flower would listen on {own.bind} for everybody; "
            "set FLOWER_BASIC_AUTH=user:password, or leave Flower out with --no-flower."
        )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def remember_home(home: Path) -> None:
    """Record the home that was started last, so that commands find it from any folder."""
    file = _last_home_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{home}\n", encoding="utf-8")


def read_env_file(path: Path) -> Mapping[str, str]:
    """Read shell-quoted `NAME=value` lines; a file that is not there has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    values = {}
    for line in lines:
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            values[name.strip()] = "".join(shlex.split(value))
    return values


def remember(home: Path, *, port_offset: int, agents: Sequence[str]) -> None:
    """Write into the home's `env` how it was started."""
    file = home / "env"
    kept = {
        name: value
        for name, value in read_env_file(file).items()
        if name not in (f"{PREFIX}PORT_OFFSET", f"{PREFIX}AGENTS")
    }
    kept[f"{PREFIX}PORT_OFFSET"] = str(port_offset)
    if agents:
        kept[f"{PREFIX}AGENTS"] = ",".join(agents)
    lines = "".join(f"{name}={shlex.quote(value)}\n" for name, value in kept.items())
    file.touch(mode=0o600)
    file.write_text(lines, encoding="utf-8")


def _last_home_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "sutazai" / "home"


def _callback_key(secret: str) -> bytes:
    if not secret.startswith(_ENCODED):
        return secret.encode()
    try:
        key = base64.b64decode(secret.removeprefix(_ENCODED), validate=True)
    except ValueError as error:
        raise ValueError(f"what follows {_ENCODED} is not base64: {error}") from None
    if not key:
        raise ValueError(f"nothing follows {_ENCODED}")
    return key


def _check_url(value: str | None, schemes: tuple[str, ...]) -> str | None:
    if value is None:
        return None
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018 - reading it is what validates it
    except ValueError as error:
        # Without the value, which may hold a password.
        raise ValueError(f"it is not a URL: {error}") from None
    if parts.scheme not in schemes:
        raise ValueError(f"the scheme {parts.scheme!r} is not one of {', '.join(schemes)}")
    if not parts.netloc:
        raise ValueError("the URL names no server")
    return value
