"""What stays of `sutazai up`: a small process between the terminal and the supervisor."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from sutazai.cli import attend

UP = """
import os, signal, sys
from sutazai.cli import attend

number = int(sys.argv[1])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
child = os.fork()
if child == 0:
    signal.alarm(30)
    os.write(1, b"running")
    for _ in range(number):
        assert signal.sigwait([signal.SIGTERM]) == signal.SIGTERM
        os.write(1, b"told")
    os._exit(7)
attend.forward_signals(child)
attend.stay(child)
"""

Up = subprocess.Popen[bytes]


@pytest.fixture
def up(request: pytest.FixtureRequest) -> Iterator[Up]:
    command = [sys.executable, "-c", UP, str(request.param)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and _name(process.pid) != "sutazai up":
            os.sched_yield()  # what comes before that, `up` itself hears
        yield process
        process.kill()


def _name(pid: int) -> str:
    with suppress(psutil.NoSuchProcess):  # it has just ended
        return psutil.Process(pid).name()
    return ""


def said(up: Up) -> bytes:
    assert up.stdout
    return os.read(up.stdout.fileno(), 100)


@pytest.mark.parametrize("up", [2], indirect=True)
def test_every_signal_is_handed_on_and_the_exit_code_is_the_supervisors(up: Up) -> None:
    assert said(up) == b"running"
    up.send_signal(signal.SIGINT)
    assert said(up) == b"told"
    up.send_signal(signal.SIGTERM)
    assert said(up) == b"told"
    _, errors = up.communicate(timeout=10)
    assert up.returncode == 7
    assert errors.decode().strip() == "Stopping; running tasks are drained. Again: stop at once."


@pytest.mark.parametrize("up", [0], indirect=True)
def test_it_ends_with_the_supervisor(up: Up) -> None:
    assert up.wait(timeout=10) == 7


@pytest.mark.parametrize("up", [1], indirect=True)
def test_it_keeps_next_to_nothing_in_memory(up: Up) -> None:
    assert said(up) == b"running"
    assert psutil.Process(up.pid).memory_info().rss < 24 * 2**20
    up.send_signal(signal.SIGTERM)
    assert up.wait(timeout=10) == 7


def test_a_signal_amid_the_first_takes_no_word_from_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[int] = []

    def stop(child: int) -> None:
        told.append(child)
        if len(told) == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(attend, "stop", stop)
    before = {number: signal.getsignal(number) for number in attend.SIGNALS}
    try:
        received = attend.forward_signals(1)
        signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert told == [1, 1]
    assert received == [signal.SIGINT, signal.SIGTERM]
    assert capsys.readouterr().err.count("Stopping") == 1
