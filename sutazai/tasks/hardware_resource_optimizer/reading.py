"""The shape of one reading of a host: what `get_metrics` returns and `sample` stores.

The names of the numbers in a reading, which `get_history` takes, are derived from these models.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, Union

from pydantic import AfterValidator, AwareDatetime, BaseModel, Field, WithJsonSchema


class Unit(NamedTuple):
    """What a number is counted in; stands in the annotation of a field."""

    name: str


Bytes = Annotated[int, Unit("bytes")]
Percent = Annotated[float, Unit("percent")]
Count = Annotated[int, Unit("count")]
Rate = Annotated[float, Unit("bytes_per_s")]
Load = Annotated[float, Unit("processes")]
Cores = Annotated[float, Unit("cores")]


class DiskUsage(BaseModel):
    """How full one file system is."""

    total: Bytes
    used: Bytes
    free: Bytes = Field(description="Bytes free for unprivileged users.")
    percent: Percent = Field(description="Used share of what unprivileged users may use.")
    mountpoint: str


class NetworkIO(BaseModel):
    """Traffic of all network interfaces since boot; rates since the reading before."""

    bytes_sent: Bytes
    bytes_recv: Bytes
    packets_sent: Count
    packets_recv: Count
    errin: Count
    errout: Count
    dropin: Count
    dropout: Count
    bytes_sent_per_s: Rate
    bytes_recv_per_s: Rate


class DiskIO(BaseModel):
    """Traffic of all disks since boot; rates since the reading before."""

    read_count: Count
    write_count: Count
    read_bytes: Bytes
    write_bytes: Bytes
    read_bytes_per_s: Rate
    write_bytes_per_s: Rate


class LoadAverage(BaseModel):
    """Mean number of runnable or blocked processes over 1, 5 and 15 minutes."""

    avg1: Load
    avg5: Load
    avg15: Load


class Swap(BaseModel):
    """Swap space."""

    total: Bytes
    used: Bytes
    free: Bytes
    percent: Percent


class Stall(BaseModel):
    """Share of time in which processes stood still for want of a resource (kernel PSI)."""

    avg10: Percent
    avg60: Percent
    avg300: Percent
    total_us: Annotated[int, Unit("microseconds")]


class Pressure(BaseModel):
    """Stalls of at least one process (some) and of all at once (full)."""

    some: Stall | None = None
    full: Stall | None = None


class Psi(BaseModel):
    """Pressure stall information; null where the kernel does not offer it.

    https://docs.kernel.org/accounting/psi.html
    """

    cpu: Pressure | None = None
    memory: Pressure | None = None
    io: Pressure | None = None


class CgroupLimits(BaseModel):
    """Limits of the control group (version 2) around this process; null where there is none."""

    memory_max: Bytes | None = None
    memory_current: Bytes | None = None
    cpu_quota_cores: Cores | None = None


class ProcessUsage(BaseModel):
    """One of the processes that use most."""

    pid: int
    name: str
    user: str
    cpu_percent: float = Field(description="Of one core, so it may exceed 100.")
    memory_bytes: int = Field(description="Resident memory.")
    memory_percent: float = Field(description="Resident memory as a share of memory_total.")
    nice: int
    started_at: float = Field(description="Unix time; together with the pid it names the process.")


class Gpu(BaseModel):
    """One NVIDIA GPU, as its driver's management library reports it."""

    index: int
    name: str
    utilization_percent: Percent
    memory_total: Bytes
    memory_used: Bytes
    temperature_celsius: Annotated[float, Unit("celsius")] | None = None
    power_watts: Annotated[float, Unit("watts")] | None = None


class Metrics(BaseModel):
    """One reading of a host. Inside a container its limits stand in for the machine's."""

    host: str
    timestamp: AwareDatetime = Field(description="When it was taken, by the host's clock.")
    cpu_percent: Percent = Field(description="Busy share of all usable cores.")
    cpu_count: Count = Field(description="Usable cores.")
    load: LoadAverage
    memory_total: Bytes
    memory_available: Bytes
    memory_percent: Percent = Field(description="Share of memory_total that is not available.")
    swap: Swap
    disk_usage: dict[str, DiskUsage] = Field(description="By device.")
    network_io: NetworkIO
    disk_io: DiskIO
    psi: Psi
    cgroup: CgroupLimits
    top_processes: list[ProcessUsage] = Field(
        description="The largest by memory and the busiest by CPU; largest first."
    )
    gpus: list[Gpu] = Field(description="Empty where there is no NVIDIA driver.")


class Number(NamedTuple):
    """A number in a reading: where it stands and what it is counted in.

    `path` holds `{device}` where the number is one a device (of a disk) or an index (of a GPU).
    """

    path: tuple[str, ...]
    unit: str

    @property
    def is_per_device(self) -> bool:
        """Whether the number exists once for each device."""
        return "{device}" in self.path

    def key(self, device: str | None) -> str:
        """Return the name under which roll-ups store it."""
        name = ".".join(part for part in self.path if part != "{device}")
        return f"{name}:{device}" if self.is_per_device else name


def _numbers(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Number]]:
    for name, annotation in typing.get_type_hints(model, include_extras=True).items():
        if name in model.model_fields:
            yield from _of_annotation(annotation, (*path, name))


def _of_annotation(annotation: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Number]]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        for extra in arguments[1:]:
            if isinstance(extra, Unit):
                name = ".".join(part for part in path if part != "{device}")
                yield name, Number(path, extra.name)
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _of_annotation(argument, path)
    elif origin in (dict, list):
        yield from _of_annotation(arguments[-1], (*path, "{device}"))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from _numbers(annotation, path)


NUMBERS: dict[str, Number] = dict(_numbers(Metrics))
"""Every number of a reading that has a unit, by name: `cpu_percent`, `psi.cpu.some.avg10`, …"""


def _known(name: str) -> str:
    if name not in NUMBERS:
        raise ValueError(f"there is no metric {name!r}; there are: {', '.join(NUMBERS)}")
    return name


MetricName = Annotated[
    str, AfterValidator(_known), WithJsonSchema({"type": "string", "enum": list(NUMBERS)})
]
"""The name of a number in a reading."""
