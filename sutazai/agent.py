"""The declaration of an agent, from which everything else is derived.

An `Agent` has a name, a port, a queue and some actions; an `Action` is one typed function that
the agent performs. What an action may know and do while it runs is its `Context`; what it may ask
of the running system is `System`. This module needs pydantic and the standard library only, so an
agent can be imported, and its actions called, without any service.

    agent = Agent("crawler", port=8101, doc="Fetches web pages.", slots=(1, 2, 8))

    @agent.action(time_limit_s=30, max_attempts=3, retry_on=(Unavailable,))
    def fetch(params: FetchParams, context: Context) -> Page:
        '''Fetch one page and return its readable text.'''

Whatever is wrong with a declaration raises `DeclarationError` at import.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, Literal, TypeVar, Union

from pydantic import BaseModel, Field, ValidationError

from sutazai import payload
from sutazai.context import Context, Delegation, Log, System, WorkerView
from sutazai.errors import DeclarationError, InvalidInput, InvalidResult, UnknownAction

__all__ = [
    "Action",
    "Agent",
    "Context",
    "Delegation",
    "Log",
    "NoParams",
    "Pool",
    "System",
    "WorkerView",
    "normalise",
]

Pool = Literal["prefork", "threads", "solo"]

RETENTION = timedelta(days=30)
"""How long ended tasks are kept where nothing else is declared."""

P = TypeVar("P", bound=BaseModel)
R = TypeVar("R", bound=BaseModel)

RESERVED_RESULT_FIELDS = frozenset({"status", "task_id", "action"})
RESERVED_PARAMS_FIELDS = frozenset({"action", "request_id"})

_AGENT_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_ACTION_NAME = re.compile(r"[a-z][a-z0-9_]*")


class NoParams(BaseModel):
    """The parameters of an action that takes none."""


@dataclass(frozen=True)
class Action(Generic[P, R]):
    """One typed function that an agent performs, with its limits; calling it calls the function."""

    agent: str
    name: str
    doc: str
    params_model: type[P]
    result_model: type[R]
    function: Callable[[P, Context], R | Delegation]
    time_limit_s: float = 60.0
    max_attempts: int = 1
    retry_on: tuple[type[BaseException], ...] = ()
    rerun_after_crash: bool = True
    key_slots: int = 1
    key_rate_per_s: float | None = None
    every: timedelta | None = None
    on: Literal["any-host", "each-host"] = "any-host"
    _schemas: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def full_name(self) -> str:
        """`<agent>.<action>`, the name of the Celery task."""
        return f"{self.agent}.{self.name}"

    def __call__(self, params: P, context: Context) -> R | Delegation:
        """Perform the action as a plain call."""
        return self.function(params, context)

    def parse(self, params: Mapping[str, Any] | BaseModel) -> P:
        """Validate parameters; unknown fields are refused whatever the model's configuration.

        Raises `InvalidInput` that names every field at fault.
        """
        if isinstance(params, BaseModel):
            params = params.model_dump(mode="json")
        payload.check(dict(params))
        try:
            return payload.parse(self.params_model, params, strict=True)
        except InvalidInput as error:
            raise InvalidInput(
                f"The parameters of {self.full_name} are not valid: {error}",
                details=error.details,
            ) from None

    def retries(self, error: BaseException) -> bool:
        """Whether a task that failed like this is tried again while attempts are left."""
        return isinstance(error, self.retry_on) and not isinstance(error, InvalidInput)

    def dump(self, result: BaseModel) -> dict[str, Any]:
        """Turn a result into the JSON object that is stored; raises `InvalidResult`."""
        if not isinstance(result, self.result_model):
            raise InvalidResult(
                f"{self.full_name} returned {type(result).__name__}, "
                f"not {self.result_model.__name__}."
            )
        try:
            fields = {**result.__dict__, **(result.__pydantic_extra__ or {})}
            self.result_model.model_validate(fields, extra="forbid", by_name=True)
            data = result.model_dump(mode="json")
            size = payload.check_plain(data)
            payload.check_finite(result.model_dump())  # a field of any type is null in `data`
        except (InvalidInput, ValidationError, ValueError, TypeError) as error:
            raise InvalidResult(f"The result of {self.full_name} is not valid: {error}") from None
        if size > payload.MAX_RESULT_BYTES:
            raise InvalidResult(
                f"The result of {self.full_name} is {size} bytes; "
                f"{payload.MAX_RESULT_BYTES} are allowed."
            )
        return data

    @property
    def params_schema(self) -> dict[str, Any]:
        """JSON Schema of the parameters, in which unknown fields are refused."""
        if "params" not in self._schemas:
            schema = self.params_model.model_json_schema()
            for part in [schema, *schema.get("$defs", {}).values()]:
                if part.get("type") == "object" and "properties" in part:
                    part["additionalProperties"] = False
            schema.setdefault("properties", {})
            schema["additionalProperties"] = False
            self._schemas["params"] = schema
        return self._schemas["params"]

    @property
    def result_schema(self) -> dict[str, Any]:
        """JSON Schema of the result."""
        if "result" not in self._schemas:
            self._schemas["result"] = self.result_model.model_json_schema(mode="serialization")
        return self._schemas["result"]


class ActionSummary(BaseModel):
    """One action, as `describe` tells it."""

    name: str
    description: str
    time_limit_s: float
    max_attempts: int
    every_s: float | None = Field(description="Period of its schedule in seconds, if it has one.")


class Description(BaseModel):
    """Who an agent is: the answer of `describe`."""

    agent: str
    description: str
    port: int
    queue: str
    pool: Pool
    slots_min: int
    slots_default: int
    slots_max: int
    actions: list[ActionSummary]


class Agent:
    """A name, a port, a queue of the same name, some actions and the pool that fits its work.

    `slots` is (fewest, default, most) tasks at once in one worker; pools are resized only within.
    `queue_limit` is how many due tasks its queue may hold before more are refused; None: any
    number.
    `retention` is how long its ended tasks are kept, with their idempotency keys, at least a day;
    those of a schedule's ticks are kept for 24 h.
    `default_action` is what a `POST /process` without an action means. Every agent has the action
    `describe`.
    """

    def __init__(
        self,
        name: str,
        *,
        port: int,
        doc: str | None,
        slots: tuple[int, int, int] = (1, 2, 4),
        pool: Pool = "prefork",
        default_action: str | None = None,
        queue_limit: int | None = None,
        retention: timedelta = RETENTION,
    ) -> None:
        if not _AGENT_NAME.fullmatch(name):
            raise DeclarationError(
                f"The agent name {name!r} must be lower-case words joined by hyphens."
            )
        if not doc or not doc.strip():
            raise DeclarationError(
                f"The agent {name} needs a doc: one sentence that says what it is for."
            )
        if not 1 <= port <= 65535:
            raise DeclarationError(f"The port {port} of {name} is not between 1 and 65535.")
        if pool not in typing.get_args(Pool):
            raise DeclarationError(
                f"The pool {pool!r} of {name} is not one of {typing.get_args(Pool)}."
            )
        if not (len(slots) == 3 and 1 <= slots[0] <= slots[1] <= slots[2]):
            raise DeclarationError(
                f"The slots {slots} of {name} must be (fewest, default, most), each at least 1."
            )
        if queue_limit is not None and queue_limit < 1:
            raise DeclarationError(f"The queue_limit {queue_limit} of {name} must be at least 1.")
        if retention < timedelta(days=1):
            raise DeclarationError(f"The retention {retention} of {name} must be at least a day.")
        self.name = name
        self.port = port
        self.queue_limit = queue_limit
        self.retention = retention
        self.doc = inspect.cleandoc(doc)
        self.slots = slots
        self.pool: Pool = pool
        self.default_action = default_action
        self.actions: dict[str, Action[Any, Any]] = {}
        self.health_checks: dict[str, Callable[[], str]] = {}
        self.action()(self._describe_action())

    def __repr__(self) -> str:
        return f"Agent({self.name!r}, port={self.port})"

    @property
    def queue(self) -> str:
        """The name of its queue, which is its own name."""
        return self.name

    @property
    def summary(self) -> str:
        """The first line of its doc."""
        return self.doc.splitlines()[0]

    def action(
        self,
        *,
        time_limit_s: float = 60.0,
        max_attempts: int = 1,
        retry_on: Sequence[type[BaseException]] = (),
        rerun_after_crash: bool = True,
        key_slots: int = 1,
        key_rate_per_s: float | None = None,
        every: timedelta | None = None,
        on: Literal["any-host", "each-host"] = "any-host",
    ) -> Callable[[Callable[[P, Context], R | Delegation]], Action[P, R]]:
        """Declare a function as an action of this agent.

        time_limit_s: after it the attempt is ended, with `TimeLimitExceeded`. max_attempts:
        failures allowed, of the kinds in `retry_on`. rerun_after_crash=False: a task whose process
        was ended, by its limit or in any other way, is failed and not repeated.
        key_slots, key_rate_per_s: of the tasks submitted with an equal concurrency key, on all
        workers together, so many run at once, and so many are started a second (on average; up to
        two seconds' worth at once).
        every: run it by itself with this period; on="each-host": once on each live host.
        """

        def declare(function: Callable[[P, Context], R | Delegation]) -> Action[P, R]:
            name = function.__name__
            full_name = f"{self.name}.{name}"
            if not _ACTION_NAME.fullmatch(name):
                raise DeclarationError(f"The action name {full_name} must be lower_case.")
            if name in self.actions:
                raise DeclarationError(f"The action {full_name} is declared twice.")
            if not (function.__doc__ or "").strip():
                raise DeclarationError(f"The action {full_name} needs a docstring.")
            if time_limit_s <= 0 or max_attempts < 1:
                raise DeclarationError(
                    f"The action {full_name} needs time_limit_s > 0 and max_attempts ≥ 1."
                )
            if key_slots < 1 or (key_rate_per_s is not None and key_rate_per_s <= 0):
                raise DeclarationError(
                    f"The action {full_name} needs key_slots ≥ 1 and key_rate_per_s > 0."
                )
            if every is not None and every < timedelta(seconds=1):
                raise DeclarationError(f"The period of {full_name} must be at least one second.")
            params_model, result_model = _models(full_name, function)
            action: Action[P, R] = Action(
                agent=self.name,
                name=name,
                doc=inspect.cleandoc(function.__doc__ or ""),
                params_model=typing.cast("type[P]", params_model),
                result_model=typing.cast("type[R]", result_model),
                function=function,
                time_limit_s=float(time_limit_s),
                max_attempts=max_attempts,
                retry_on=tuple(retry_on),
                rerun_after_crash=rerun_after_crash,
                key_slots=key_slots,
                key_rate_per_s=key_rate_per_s,
                every=every,
                on=on,
            )
            if every is not None:
                try:
                    action.parse({})
                except InvalidInput as error:
                    raise DeclarationError(
                        f"{full_name} has a schedule but cannot run without parameters: {error}"
                    ) from None
            self.actions[name] = action
            return action

        return declare

    def health_check(self, name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
        """Declare a check of this agent's own for `GET /health`.

        The function takes nothing, is called at most every 5 s on a thread of the front and
        returns `"ok"`, `"absent"` (not configured: still healthy), or what is wrong.
        """

        def declare(function: Callable[[], str]) -> Callable[[], str]:
            if name in self.health_checks:
                raise DeclarationError(f"The health check {name} of {self.name} is declared twice.")
            self.health_checks[name] = function
            return function

        return declare

    def get(self, action: str) -> Action[Any, Any]:
        """Return an action by name; raises `UnknownAction`, whose message lists the known ones."""
        try:
            return self.actions[action]
        except KeyError:
            known = ", ".join(sorted(self.actions))
            raise UnknownAction(
                f"{self.name} has no action {action!r}; it has: {known}.",
                details=sorted(self.actions),
            ) from None

    def describe(self) -> Description:
        """Return who this agent is, from its declaration."""
        return Description(
            agent=self.name,
            description=self.doc,
            port=self.port,
            queue=self.queue,
            pool=self.pool,
            slots_min=self.slots[0],
            slots_default=self.slots[1],
            slots_max=self.slots[2],
            actions=[
                ActionSummary(
                    name=action.name,
                    description=action.doc,
                    time_limit_s=action.time_limit_s,
                    max_attempts=action.max_attempts,
                    every_s=action.every.total_seconds() if action.every else None,
                )
                for action in self.actions.values()
            ],
        )

    def _describe_action(self) -> Callable[[NoParams, Context], Description]:
        def describe(params: NoParams, context: Context) -> Description:  # noqa: ARG001
            """Tell who this agent is, its actions and their limits."""
            return self.describe()

        return describe


def normalise(name: str) -> str:
    """Return an agent's name with hyphens; underscores are accepted and mean the same."""
    return name.strip().replace("_", "-")


def _models(
    full_name: str, function: Callable[..., Any]
) -> tuple[type[BaseModel], type[BaseModel]]:
    """Read the parameters' and the result's model from a function's annotations."""
    if inspect.iscoroutinefunction(function):
        raise DeclarationError(f"{full_name} is async; workers run plain functions.")
    names = list(inspect.signature(function).parameters)
    if len(names) != 2:
        raise DeclarationError(f"{full_name} must take exactly (params, context).")
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise DeclarationError(
            f"An annotation of {full_name} cannot be resolved: {error}"
        ) from None
    params_model = hints.get(names[0])
    result_model = hints.get("return")
    if typing.get_origin(result_model) in (Union, types.UnionType):
        rest = [part for part in typing.get_args(result_model) if part is not Delegation]
        result_model = rest[0] if len(rest) == 1 else result_model
    for model, what, reserved in (
        (params_model, "parameters", RESERVED_PARAMS_FIELDS),
        (result_model, "result", RESERVED_RESULT_FIELDS),
    ):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise DeclarationError(
                f"The {what} of {full_name} must be a pydantic model, not {model!r}."
            )
        names_used = set(model.model_fields) | {
            info.alias for info in model.model_fields.values() if info.alias
        }
        if taken := sorted(reserved & names_used):
            raise DeclarationError(
                f"The {what} of {full_name} may not have the field {', '.join(taken)}."
            )
    return typing.cast("type[BaseModel]", params_model), typing.cast(
        "type[BaseModel]", result_model
    )
