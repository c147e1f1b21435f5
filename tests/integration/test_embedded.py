"""The embedded servers and their supervision, with real processes."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
import psycopg
import pytest
import redis

from sutazai import embedded
from sutazai.embedded import ProgramState, Supervisor
from sutazai.embedded.wait import wait_until
from sutazai.errors import ConfigurationError, NotFound, Unavailable

SCRIPT = Path(__file__).with_name("supervised.py")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")


@pytest.fixture
def home() -> Iterator[Path]:
    """Give a home that does not exist yet, and leave no process of it behind."""
    folder = Path(tempfile.mkdtemp(prefix="sutazai-", dir="/tmp"))
    folder.chmod(0o711)
    yield folder / "home"
    with suppress(ConfigurationError):
        embedded.recover(folder / "home", program_grace_s=0.1)
    shutil.rmtree(folder)


@contextmanager
def supervised(
    home: Path, *ports: int, stderr: int | IO[str] = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    """Supervise a home in a process of its own, in which `steady` runs on entering."""
    process = start(home, *ports, stderr=stderr)
    try:
        wait_for(lambda: process.poll() or state(home, "steady").state == "RUNNING")
        assert process.poll() is None, process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


def start(
    home: Path, *ports: int, stderr: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    source = f"{Path(embedded.__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(home), *map(str, ports)],
        env={**os.environ, "PYTHONPATH": source},
        stderr=stderr,
        text=True,
    )


def state(home: Path, name: str) -> ProgramState:
    with suppress(Exception):
        return next(p for p in Supervisor(home).programs() if p.name == name)
    return ProgramState(name, "UNKNOWN", 0, 0.0, 0, home)


def writes(pid: int) -> int:
    """Return how often a process has written anywhere."""
    return int(psutil.Process(pid).io_counters().write_count)


def is_stopping(home: Path) -> bool:
    assert Supervisor(home).running()
    try:
        Supervisor(home).programs()
    except Unavailable as error:
        return str(error) == "The supervisor is stopping."
    return False


def wait_for(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    assert wait_until(lambda: bool(condition()), timeout_s), "not within the time"


def steady_pids(home: Path) -> tuple[int, int]:
    """Return the latest process of `steady` and its offspring."""
    log = embedded.Layout(home).log("steady")
    wait_for(lambda: log.exists() and "offspring" in log.read_text())
    pid, offspring = re.findall(r"pid (\d+) offspring (\d+)", log.read_text())[-1]
    return int(pid), int(offspring)


def gone(*pids: int) -> bool:
    def dead(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return all(map(dead, pids))


def everything(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


# -- the servers -------------------------------------------------------------------------------


def test_servers_answer_with_their_password_only(servers: Any) -> None:
    with psycopg.connect(servers.database_url, options="-c lock_timeout=2s") as connection:
        row = connection.execute(
            "SELECT current_user, current_database(), rolsuper"
            " FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
        assert row == ("sutazai", "sutazai", False)
        for name in ("fsync", "synchronous_commit", "full_page_writes", "autovacuum"):
            assert connection.execute(f"SHOW {name}").fetchone() == ("on",)
    assert redis.Redis.from_url(servers.broker_url).ping()

    wrong = re.sub(r"sutazai:[^@]+@", "sutazai:wrong@", servers.database_url)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong)
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(re.sub(r":[^@/]+@", ":wrong@", servers.broker_url)).ping()


def test_servers_listen_on_loopback_only(servers: Any) -> None:
    ports = {
        int(p) for p in re.findall(r"127.0.0.1:(\d+)", servers.database_url + servers.broker_url)
    }
    bound = {
        (c.laddr.ip, c.laddr.port)
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port in ports
    }
    assert bound == {("127.0.0.1", port) for port in ports}


def test_env_file_can_be_sourced_by_a_shell(servers: Any) -> None:
    path = servers.home / "env"
    assert path.stat().st_mode & 0o777 == 0o600
    command = f'set -a; . {shlex.quote(str(path))}; printf %s "$SUTAZAI_DATABASE_URL"'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == servers.database_url


def test_second_preparation_keeps_passwords_and_takes_new_ports(home: Path) -> None:
    first = embedded.prepare(home, 10000, 10001)
    second = embedded.prepare(home, 11000, 11001)
    assert second == {name: value.replace(":1000", ":1100") for name, value in first.items()}
    assert f"SUTAZAI_DATABASE_URL={second['SUTAZAI_DATABASE_URL']}\n" in (home / "env").read_text()
    assert home.stat().st_mode & 0o007 == 0


def test_half_made_data_are_made_again(home: Path) -> None:
    embedded.Layout(home).make()
    (home / "postgresql.new").mkdir()
    (home / "postgresql.new" / "PG_VERSION").write_text("18\n")
    embedded.prepare(home, 10000, 10001)
    assert (home / "postgresql" / "global").is_dir()


# -- supervision -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_stops_everything(home: Path, number: signal.Signals) -> None:
    with supervised(home) as supervisor:
        pids = everything(supervisor.pid)
        steady_pids(home)
        supervisor.send_signal(number)
        assert supervisor.wait(10) == 0
        assert gone(*pids)
    log = embedded.Layout(home).log("steady").read_text()
    assert "argv ['sutazai', 'steady', 'x y']" in log
    assert "env 50% red stdin ''" in log
    assert log.endswith("drained\n")
    assert not embedded.Layout(home).socket.exists()


def test_a_second_signal_stops_at_once(home: Path) -> None:
    with supervised(home) as supervisor:
        Supervisor(home).start("deaf")
        pids = everything(supervisor.pid)
        told_at = time.monotonic()
        supervisor.terminate()
        wait_for(lambda: is_stopping(home))
        # Two signals within half a second count as one.
        wait_for(lambda: time.monotonic() - told_at > 0.7)
        supervisor.send_signal(signal.SIGINT)
        assert supervisor.wait(5) == 1
        assert gone(*pids)


def test_a_hangup_changes_nothing(home: Path) -> None:
    with supervised(home) as supervisor:
        before = steady_pids(home)
        supervisor.send_signal(signal.SIGHUP)
        Supervisor(home).start("deaf")  # takes a second: the signal has been dealt with
        assert steady_pids(home) == before
        assert state(home, "steady").pid == before[0]


def test_a_killed_program_is_started_again_without_its_offspring(home: Path) -> None:
    with supervised(home):
        before = steady_pids(home)
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: steady_pids(home) != before, timeout_s=3)
        wait_for(lambda: gone(*before), timeout_s=1)


def test_a_program_that_always_fails_is_tried_for_ever(home: Path) -> None:
    with supervised(home):
        with suppress(Exception):
            Supervisor(home).start("crash")
        log = embedded.Layout(home).log("crash")
        wait_for(lambda: log.read_text().count("crashed") >= 4, timeout_s=12)
        assert state(home, "crash").state in {"BACKOFF", "STARTING"}
        wait_for(lambda: state(home, "crash").exit_status == 3)
        Supervisor(home).stop("crash")
        assert state(home, "crash").state == "STOPPED"


@linux
def test_logs_that_cannot_be_written_end_nothing_and_go_on_when_they_can(home: Path) -> None:
    log = embedded.Layout(home).log("chatty")
    # As in `sutazai up`, where what supervisord prints itself goes to a file too.
    with (home.parent / "stderr").open("w") as stderr, supervised(home, stderr=stderr) as process:
        client = Supervisor(home)
        client.start("chatty")
        pid = state(home, "chatty").pid
        wait_for(lambda: log.exists() and log.read_text())
        # Of this process only, and of files only: to write to one fails as on a full disk.
        limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
        client.stop("steady")  # which supervisord's own log tells of
        printed = writes(pid)
        wait_for(lambda: writes(pid) > printed)
        assert client.running()  # it answers after it has read what was printed before
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
        wait_for(lambda: "writes lost" in log.read_text())
        wait_for(lambda: log.read_text().splitlines()[-1].startswith("line "))
        assert state(home, "chatty").pid == pid
        assert process.poll() is None


def test_the_client_stops_starts_and_shuts_down(home: Path) -> None:
    with supervised(home) as supervisor:
        client = Supervisor(home)
        pid, _ = steady_pids(home)
        client.restart("steady")
        client.start("steady")  # runs already
        assert state(home, "steady").pid not in {0, pid}
        assert state(home, "steady").uptime_s >= 1
        client.stop("steady")
        client.stop("steady")  # stopped already
        assert (state(home, "steady").state, state(home, "steady").pid) == ("STOPPED", 0)
        with pytest.raises(NotFound, match="nobody"):
            client.restart("nobody")
        reaper = threading.Thread(target=supervisor.wait)
        reaper.start()  # otherwise it stays a zombie, and is waited for in vain
        client.shutdown(wait_s=10)
        reaper.join()
        assert supervisor.returncode == 0
        assert not client.running()


def test_a_home_is_supervised_once(home: Path) -> None:
    with supervised(home) as first:
        second = start(home)
        _, stderr = second.communicate(timeout=20)
        assert second.returncode == 1
        assert f"already in use by the process {first.pid}" in stderr
        assert state(home, "steady").state == "RUNNING"


def test_a_deep_home_works(home: Path) -> None:
    deep = home / ("d" * 100)
    with supervised(deep) as supervisor:
        folder = embedded.Layout(deep).socket.parent
        assert folder != deep / "run"
        supervisor.terminate()
        assert supervisor.wait(10) == 0
        assert not folder.exists()
    embedded.recover(deep)


@linux
def test_a_killed_supervisor_leaves_no_program(home: Path) -> None:
    with supervised(home) as supervisor:
        pids = steady_pids(home)
        supervisor.kill()
        wait_for(lambda: gone(*pids), timeout_s=5)
        assert embedded.Layout(home).log("steady").exists()


def test_offspring_of_killed_programs_are_cleared_at_the_next_start(home: Path) -> None:
    with supervised(home) as supervisor:
        pid, offspring = steady_pids(home)
        os.kill(supervisor.pid, signal.SIGSTOP)  # so that it cannot clear up itself
        os.kill(pid, signal.SIGKILL)
        supervisor.kill()
        supervisor.wait()
        assert not gone(offspring)
    with supervised(home):
        assert gone(offspring)
        assert steady_pids(home)[0] != pid


def test_after_kill_of_everything_the_next_start_recovers(home: Path, servers: Any) -> None:
    ports = free_ports()
    with supervised(home, *ports) as supervisor:
        env = dict(line.split("=", 1) for line in (home / "env").read_text().splitlines())
        url = env["SUTAZAI_DATABASE_URL"]
        embedded.wait_for_servers(env)
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE kept (x int)")
        pids = everything(supervisor.pid)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: gone(*pids))
        assert (home / "postgresql" / "postmaster.pid").exists()
    with supervised(home, *ports):
        embedded.wait_for_servers(env)
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)
        assert redis.Redis.from_url(servers.broker_url).ping(), "another home was touched"


def test_orphaned_servers_of_this_home_are_stopped_and_no_others(home: Path, servers: Any) -> None:
    env = embedded.prepare(home, *free_ports())
    orphans = [
        subprocess.Popen(
            program.argv, cwd="/", stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        for program in embedded.server_programs(home)
    ]
    with ExitStack() as stack:
        for orphan in orphans:
            stack.callback(orphan.wait)
        embedded.wait_for_servers(env)
        embedded.recover(home)
        assert [orphan.wait(5) for orphan in orphans] == [0, 0]
    embedded.wait_for_servers(
        {"SUTAZAI_DATABASE_URL": servers.database_url, "SUTAZAI_REDIS_URL": servers.redis_url}
    )


def test_a_stale_postmaster_file_with_the_id_of_another_process_is_no_obstacle(home: Path) -> None:
    ports = free_ports()
    embedded.prepare(home, *ports)
    stale = home / "postgresql" / "postmaster.pid"
    # Process 1 always exists and is never PostgreSQL.
    stale.write_text(f"1\n{home / 'postgresql'}\n1\n{ports[0]}\n\n127.0.0.1\n0 0\nready\n")
    embedded.prepare(home, *ports)
    assert not stale.exists()


def free_ports() -> tuple[int, int]:
    from socket import socket

    with socket() as first, socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]
