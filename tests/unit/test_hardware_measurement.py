"""One reading of a host: limits of a container, pressure, true shares of CPU time, processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from sutazai.tasks.hardware_resource_optimizer import measurement
from sutazai.tasks.hardware_resource_optimizer.cgroup import (
    Sources,
    folder,
    parse_pressure,
    read_limits,
    read_psi,
)
from sutazai.tasks.hardware_resource_optimizer.measurement import Meter, printable
from sutazai.tasks.hardware_resource_optimizer.reading import NUMBERS

MIB = 1 << 20
PRESSURE = (
    "some avg10=12.50 avg60=3.10 avg300=0.70 total=123456\n"
    "full avg10=1.25 avg60=0.50 avg300=0.00 total=4567\n"
)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def container(tmp_path: Path) -> Sources:
    """A made-up container of 512 MiB and half a core, as its own files show it."""
    cgroup, proc = tmp_path / "cgroup", tmp_path / "proc"
    write(cgroup / "cgroup.controllers", "cpu io memory\n")
    write(cgroup / "memory.max", f"{512 * MIB}\n")
    write(cgroup / "memory.current", f"{300 * MIB}\n")
    write(cgroup / "memory.stat", f"anon 1\ninactive_file {100 * MIB}\n")
    write(cgroup / "cpu.max", "50000 100000\n")
    write(cgroup / "cpu.stat", "usage_usec 1000000\n")
    for resource in ("cpu", "memory", "io"):
        write(cgroup / f"{resource}.pressure", PRESSURE)
        write(proc / "pressure" / resource, "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    write(proc / "self" / "cgroup", "0::/\n")
    return Sources(cgroup, proc)


def test_memory_in_a_container_is_what_its_group_allows(container: Sources) -> None:
    metrics = Meter(container).read("box")
    assert metrics.memory_total == 512 * MIB
    # Page cache that can be dropped (inactive_file) is available.
    assert metrics.memory_available == (512 - 300 + 100) * MIB
    assert metrics.memory_percent == round(100 * 200 / 512, 1)
    assert metrics.cgroup.memory_max == 512 * MIB
    assert metrics.cgroup.memory_current == 300 * MIB
    assert metrics.cgroup.cpu_quota_cores == 0.5
    assert metrics.cpu_count == 1


def test_pressure_in_a_container_is_its_own(container: Sources) -> None:
    psi = read_psi(container, read_limits(container))
    assert psi.memory is not None
    assert psi.memory.some is not None
    assert psi.memory.some.avg10 == 12.5
    assert psi.memory.some.avg60 == 3.1
    assert psi.memory.some.avg300 == 0.7
    assert psi.memory.some.total_us == 123456
    assert psi.memory.full is not None
    assert psi.memory.full.avg10 == 1.25


def test_pressure_without_limits_is_the_machines(container: Sources) -> None:
    (container.cgroup / "memory.max").write_text("max\n")
    (container.cgroup / "cpu.max").write_text("max 100000\n")
    psi = read_psi(container, read_limits(container))
    assert psi.memory is not None
    assert psi.memory.some is not None
    assert psi.memory.some.avg10 == 0
    assert psi.memory.full is None


@pytest.mark.parametrize("text", ["", "\n"])
def test_pressure_that_the_kernel_does_not_offer_is_none(text: str) -> None:
    assert parse_pressure(text) is None


def test_tightest_limit_of_all_levels_holds(container: Sources) -> None:
    own = container.cgroup / "app.slice" / "app.service"
    write(container.proc / "self" / "cgroup", "1:name=systemd:/x\n0::/app.slice/app.service\n")
    write(own / "memory.max", "max\n")
    write(own.parent / "memory.max", f"{256 * MIB}\n")
    write(own.parent / "memory.current", f"{10 * MIB}\n")
    write(own / "cpuset.cpus.effective", "0-1,4\n")
    limits = read_limits(container)
    assert limits.memory_max == 256 * MIB
    assert limits.memory_current == 10 * MIB
    assert limits.cpu_quota_cores == 0.5
    assert limits.cpuset_cores == 3


def test_limit_above_the_machine_is_none(container: Sources) -> None:
    host = psutil.virtual_memory().total
    (container.cgroup / "memory.max").write_text(str(2 * host))
    assert Meter(container).read("box").memory_total == host


@pytest.mark.parametrize("membership", ["0::/gone\n", "0::/../other\n", "4:memory:/docker\n"])
def test_unseen_group_is_taken_for_the_root(container: Sources, membership: str) -> None:
    write(container.proc / "self" / "cgroup", membership)
    assert folder(container) == container.cgroup


def test_version_1_says_nothing_of_limits(tmp_path: Path) -> None:
    write(tmp_path / "cgroup" / "memory" / "memory.limit_in_bytes", str(MIB))
    sources = Sources(tmp_path / "cgroup", tmp_path / "proc")
    metrics = Meter(sources).read("old")
    assert metrics.cgroup.model_dump() == {
        "memory_max": None,
        "memory_current": None,
        "cpu_quota_cores": None,
    }
    assert metrics.memory_total == psutil.virtual_memory().total


def test_version_2_beside_version_1_is_found(tmp_path: Path) -> None:
    write(tmp_path / "cgroup" / "unified" / "cgroup.controllers", "")
    write(tmp_path / "proc" / "self" / "cgroup", "4:memory:/x\n0::/\n")
    sources = Sources(tmp_path / "cgroup", tmp_path / "proc")
    assert folder(sources) == tmp_path / "cgroup" / "unified"


class Times(NamedTuple):
    user: float
    system: float
    idle: float
    iowait: float
    guest: float


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waited: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.now += seconds


def test_cpu_percent_is_a_difference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock()
    # Two cores: at second 1000 all was idle, from there on 75 % is busy and 5 % waits for a disk.
    # Guest time is a part of user time, and counts once.
    monkeypatch.setattr(
        psutil,
        "cpu_times",
        lambda: Times(
            user=(clock.now - 1000) * 1.0,
            system=(clock.now - 1000) * 0.5,
            idle=2000 + (clock.now - 1000) * 0.4,
            iowait=(clock.now - 1000) * 0.1,
            guest=(clock.now - 1000) * 0.3,
        ),
    )
    meter = Meter(Sources(tmp_path, tmp_path), clock=clock, wait=clock.wait)
    assert meter.read("a").cpu_percent == 75.0
    assert clock.waited == [pytest.approx(measurement.SHORTEST_INTERVAL_S)]
    clock.now += 30
    assert meter.read("a").cpu_percent == 75.0
    assert len(clock.waited) == 1, "a recent count is used without waiting"
    meter.read("a")
    assert len(clock.waited) == 2, "but not one of this very moment"
    clock.now += measurement.LONGEST_INTERVAL_S + 1
    meter.read("a")
    assert len(clock.waited) == 3, "nor one that is too old"


def test_cpu_percent_under_a_quota_is_a_share_of_it(container: Sources) -> None:
    clock = Clock()

    def wait(seconds: float) -> None:
        clock.wait(seconds)
        # A quarter of the half core that is allowed.
        write(container.cgroup / "cpu.stat", f"usage_usec {1_000_000 + int(seconds * 125_000)}\n")

    assert Meter(container, clock=clock, wait=wait).read("box").cpu_percent == 25.0


def test_real_load_shows() -> None:
    with spinning() as pid:
        metrics = Meter().read("here")
    assert metrics.cpu_percent > 0
    assert pid in {usage.pid for usage in metrics.top_processes if usage.cpu_percent > 5}


@contextmanager
def spinning() -> Iterator[int]:
    """A process that keeps a core busy."""
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def test_large_process_is_named_with_its_start() -> None:
    code = "x = bytearray(b'1') * (300 << 20); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as hog:
        assert hog.stdout is not None
        hog.stdout.readline()
        found = {usage.pid: usage for usage in Meter().read("here").top_processes}
        started_at = psutil.Process(hog.pid).create_time()
        hog.communicate(b"\n")
    assert found[hog.pid].memory_bytes >= 300 * MIB
    assert found[hog.pid].started_at == started_at
    sizes = [usage.memory_bytes for usage in found.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_every_number_of_a_reading_can_be_asked_for() -> None:
    reading = Meter().read("here").model_dump()
    for name, number in NUMBERS.items():
        value: Any = reading
        for part in number.path:
            if part == "{device}":
                if not value:
                    break  # no GPU here
                value = next(iter(value.values()))
            else:
                value = value[part]
                if value is None:
                    break
        assert not isinstance(value, str), name
    assert {"cpu_percent", "memory_percent", "disk_usage.used", "psi.memory.some.avg60"} <= set(
        NUMBERS
    )
    assert NUMBERS["memory_available"].unit == "bytes"
    assert NUMBERS["disk_usage.used"].key("/dev/x") == "disk_usage.used:/dev/x"


def test_root_is_measured_when_it_is_on_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Partition(NamedTuple):
        device: str
        mountpoint: str
        fstype: str

    def partitions(all: bool = False) -> list[Partition]:  # noqa: A002 - psutil's name
        return [Partition("overlay", "/", "overlay")] if all else []

    monkeypatch.setattr(psutil, "disk_partitions", partitions)
    disks = measurement.read_disks()
    assert list(disks) == ["overlay"]
    assert disks["overlay"].total == psutil.disk_usage("/").total


def test_names_that_are_not_text_are_escaped() -> None:
    assert printable(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\\xe9"
    assert printable("café") == "café"
