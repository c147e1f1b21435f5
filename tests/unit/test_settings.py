"""Settings: where values come from, and what a bad one says."""

import os
from pathlib import Path

import pytest

from sutazai.errors import ConfigurationError
from sutazai.settings import (
    HOME_FOLDER,
    find_home,
    read_env_file,
    remember,
    remember_home,
    settings,
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in list(os.environ):
        if name.startswith("SUTAZAI_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("DATABASE_URL", "mysql://x/y", "'mysql' is not one of postgresql"),
        ("BROKER_URL", "http://x", "redis, rediss, sentinel, amqp, amqps"),
        ("REDIS_URL", "redis:", "names no server"),
        ("PORTS", "a=b", "'a=b' is not agent=number"),
        ("PORTS", "a=70000", "not between 1 and 65535"),
        ("PORT_OFFSET", "many", "integer"),
        ("CONCURRENCY", "a=0", "between 1 and 1000 slots"),
        ("LOG_FORMAT", "xml", "console"),
        ("CALLBACK_SECRET", "whsec_not base64", "what follows whsec_ is not base64"),
        ("CALLBACK_SECRET", "whsec_abc", "what follows whsec_ is not base64"),
        ("CALLBACK_SECRET", "whsec_", "nothing follows whsec_"),
        ("CALLBACK_HOSTS", "10.0.0.1/8", "host bits"),
    ],
)
def test_a_bad_value_is_one_line_with_an_example(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(f"SUTAZAI_{variable}", value)
    with pytest.raises(ConfigurationError) as refused:
        settings()
    message = str(refused.value)
    assert message.startswith(f"SUTAZAI_{variable}: ")
    assert says in message
    assert "for example" in message
    assert "\n" not in message


def test_a_secret_may_stand_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://u:p@h/d\n")
    monkeypatch.setenv("SUTAZAI_DATABASE_URL_FILE", str(tmp_path / "url"))
    assert settings().database_url == "postgresql://u:p@h/d"


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUTAZAI_DATABASE_URL_FILE", "/no/such/file")
    with pytest.raises(ConfigurationError, match=r"SUTAZAI_DATABASE_URL_FILE.*/no/such/file"):
        settings()


def test_the_environment_wins_over_the_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / HOME_FOLDER
    home.mkdir()
    (home / "env").write_text(
        "SUTAZAI_DATABASE_URL='postgresql://u:p@h/d'\nSUTAZAI_BROKER_URL=redis://b:1/0\n"
    )
    monkeypatch.setenv("SUTAZAI_BROKER_URL", "amqp://x:1//")
    assert settings().database_url == "postgresql://u:p@h/d"
    assert settings().broker_url == "amqp://x:1//"
    assert settings().signals_url is None
    assert settings().require_services() is settings()


def test_the_home_is_the_nearest_then_the_last_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find_home() == tmp_path / HOME_FOLDER
    other = tmp_path / "other" / HOME_FOLDER
    other.mkdir(parents=True)
    remember_home(other)
    assert find_home() == other
    (tmp_path / HOME_FOLDER).mkdir()
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert find_home() == tmp_path / HOME_FOLDER
    monkeypatch.setenv("SUTAZAI_HOME", "/elsewhere")
    assert find_home() == Path("/elsewhere")


def test_without_stores_one_line_says_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match="sutazai up"):
        settings().require_services()


def test_names_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUTAZAI_PORTS", "ai_metrics_exporter=9063, crawler=9000")
    monkeypatch.setenv("SUTAZAI_PORT_OFFSET", "100")
    assert settings().port("ai-metrics-exporter", 11063) == 9063
    assert settings().port("hardware-resource-optimizer", 8002) == 8102


def test_quoted_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("# comment\nA='x y'\nB=z\n")
    assert read_env_file(tmp_path / "env") == {"A": "x y", "B": "z"}
    assert read_env_file(tmp_path / "none") == {}


def test_a_home_remembers_how_it_was_started(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("SUTAZAI_DATABASE_URL='postgresql://u:p w@h/d'\n")
    remember(tmp_path, port_offset=100, agents=("a:agent", "b:agent"))
    remember(tmp_path, port_offset=200, agents=())
    assert read_env_file(tmp_path / "env") == {
        "SUTAZAI_DATABASE_URL": "postgresql://u:p w@h/d",
        "SUTAZAI_PORT_OFFSET": "200",
    }


def test_a_new_env_is_for_its_owner_only(tmp_path: Path) -> None:
    remember(tmp_path, port_offset=0, agents=())
    assert (tmp_path / "env").stat().st_mode & 0o777 == 0o600
