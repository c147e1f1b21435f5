"""The Celery application: binds every action, rings the bell, and answers for the system.

`celery -A sutazai …` finds `app` here. A task's message is only a notice (bell.py); the task
itself is a row, so every way in through Celery (`celery call`, `.delay()`, Flower's API) writes
the row first, and every result is read from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import UUID

from celery import Celery, Task, bootsteps, signals
from celery.backends.base import BaseBackend
from celery.exceptions import Ignore, InvalidTaskError, WorkerLostError

from sutazai import (
    admission,
    db,
    lifecycle,
    log,
    redis,
    revocation,
    statements,
    transport,
    watchers,
)
from sutazai.agent import Action, Agent, WorkerView
from sutazai.bell import NOTICE_HEADER
from sutazai.broker import direct_queue
from sutazai.embedded import Supervisor
from sutazai.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    InvalidInput,
    LeaseLost,
    SutazaiError,
    TaskFailed,
    Unavailable,
    UnknownAction,
    Unsupported,
)
from sutazai.hand import perform_all
from sutazai.keeper import Identity, Keeper
from sutazai.models import new_id
from sutazai.prefetch import Prefetch, slots_of
from sutazai.reaping import Reaping
from sutazai.reports import Reports
from sutazai.ringer import CeleryBell, abandon, faults
from sutazai.settings import prepare_flower, settings
from sutazai.state import State
from sutazai.submission import DEFAULT_PRIORITY, Options, Submission
from sutazai.tasks import load
from sutazai.worker import NotClaimed, Requeued, Site, Unrecorded, adopt, perform

_logger = log.get(__name__)


# --- the application ------------------------------------------------------------------------


class Application(Celery):  # type: ignore[misc]
    """Celery whose messages are notices of rows."""

    control_cls = revocation.Control

    def bell(self) -> CeleryBell:
        """Return this process's bell."""
        return bell()

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Accept a task as every other way in does: the row first, then the notice.

        `priority`, `task_id`, `eta`, `countdown` and `expires` are taken; what would start other
        tasks is refused, and the rest of Celery's options have no meaning here.
        Raises `UnknownAgent`, `UnknownAction`, and `InvalidInput` for parameters that do not fit.
        """
        if name.startswith("celery."):
            return super().send_task(name, args, kwargs, **options)
        action = find_action(name)
        if chained := [option for option in _CHAINING if options.get(option)]:
            raise InvalidInput(f"{name} cannot be sent with {chained[0]}: tasks are not chained.")
        if args:
            raise InvalidInput(f"{name} takes named parameters only; pass them as kwargs.")
        try:
            task_id = UUID(options["task_id"]) if options.get("task_id") else new_id()
            chosen = Options(
                priority=DEFAULT_PRIORITY
                if options.get("priority") is None
                else options["priority"],
                run_at=_instant(options.get("eta"), options.get("countdown")),
                deadline_at=_instant(options.get("expires")),
            )
        except ValueError as error:
            raise InvalidInput(f"{name} cannot be sent like this: {error}") from None
        submission = Submission(action, kwargs or {}, chosen, "celery", task_id)
        return self.AsyncResult(str(submit(submission).task_id))


_CHAINING = ("link", "link_error", "chain", "chord")
"""Celery's options that name tasks to be sent when this one has ended."""


class TaskRows(BaseBackend):  # type: ignore[misc]
    """The result backend that `celery result` and `AsyncResult` read: the task's row.

    Workers record outcomes themselves; what Celery would write is not needed and never fails.
    """

    supports_autoexpire = True
    _STATES = {  # noqa: RUF012 - read only
        State.QUEUED: "PENDING",
        State.RUNNING: "STARTED",
        State.WAITING: "STARTED",
        State.SUCCEEDED: "SUCCESS",
        State.FAILED: "FAILURE",
        State.CANCELLED: "REVOKED",
    }

    def store_result(self, *_: Any, **__: Any) -> None:
        """Do nothing: the row is written by the worker."""

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        try:
            wanted = UUID(task_id)
        except ValueError:
            return {"status": "PENDING", "result": None}
        with db.transaction() as connection:
            row = connection.execute(statements.task(wanted)).first()
        if row is None:
            return {"status": "PENDING", "result": None}
        state = State(row.state)
        result: Any = row.result
        if state in (State.FAILED, State.CANCELLED):
            result = TaskFailed(f"{row.error['code']}: {row.error['message']}")
        return {
            "task_id": task_id,
            "status": self._STATES[state],
            "result": result,
            "traceback": None,
            "children": [],
            "date_done": row.finished_at.isoformat() if row.finished_at else None,
        }


def _instant(value: Any, countdown: Any = None) -> datetime | None:
    """Return what Celery takes as an instant: a datetime, ISO text, or seconds from now."""
    seconds = countdown if countdown is not None else value
    if isinstance(seconds, int | float):
        return datetime.now(UTC) + timedelta(seconds=seconds)
    found = datetime.fromisoformat(value) if isinstance(value, str) else value
    return found.replace(tzinfo=UTC) if found is not None and found.tzinfo is None else found


def find_action(name: str) -> Action[Any, Any]:
    """Return the action of a Celery task's name, `<agent>.<action>`.

    Raises `UnknownAgent` and `UnknownAction`.
    """
    agent_name, _, action_name = name.partition(".")
    return load().get(agent_name).get(action_name)


def submit(submission: Submission) -> admission.Accepted:
    """Accept a task and ring; raises as `admission.accept` does."""
    rung = admission.will_ring(submission, bell())
    with db.transaction() as connection:
        accepted = admission.accept(
            connection, submission, rung=rung, limit=load().get(submission.action.agent).queue_limit
        )
    if accepted.fresh and rung:
        bell().ring([submission.notice])
    redis.announce_ended(accepted.replaced)
    return accepted


def _create() -> Application:
    try:
        settings().require_services()
        if "flower" in sys.argv:  # `celery -A sutazai flower`
            prepare_flower()
    except ConfigurationError as error:
        # `celery -A sutazai` shows a traceback for anything but an exit.
        sys.exit(f"sutazai: {error}")
    if Path(sys.argv[0]).name == "celery":
        sys.excepthook = _say_in_one_line
    transport.install()
    made = Application("sutazai", set_as_current=True)
    values = runpy.run_path(str(_located("celeryconfig.py")))
    made.conf.update({k: v for k, v in values.items() if k.islower() and not callable(v)})
    for agent in load().agents.values():
        for action in agent.actions.values():
            _bind(made, action)
    made.steps["worker"].add(KeeperStep)
    made.steps["worker"].add(Reaping)
    made.steps["consumer"].add(watchers.BatchEvents)
    made.steps["consumer"].add(Prefetch)
    return made


def _say_in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Let the `celery` command show an error of ours as `sutazai` does."""
    if isinstance(error, SutazaiError):
        sys.stderr.write(f"sutazai: {error}\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _located(name: str) -> Path:
    """Find a file that stands beside the package in a checkout and inside it in a wheel."""
    package = Path(__file__).parent
    return next(path for path in (package / name, package.parent / name) if path.exists())


class CheckedRequest(watchers.HandRequest):
    """A request that no message can make end the pool's loop: Celery checks all but these."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        limits = self.time_limits
        is_pair = isinstance(limits, list | tuple) and len(limits) == 2
        if not is_pair or not {type(limit) for limit in limits} <= {int, float, type(None)}:
            raise InvalidTaskError(f"invalid time limits {limits!r}")

    def on_failure(self, exc_info: Any, *args: Any, **options: Any) -> Any:
        """Do as Celery; what a dead process had not claimed yet is rung again at once."""
        keeper: Keeper | None = _state.get("keeper")
        # Not the exception itself: billiard wraps it.
        if keeper is not None and issubclass(exc_info.type, WorkerLostError):
            # A foreign message may have anything for its id.
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                keeper.lost_notice((UUID(self.id), *watchers.others_of(self.request_dict)))
        return super().on_failure(exc_info, *args, **options)


def _bind(made: Celery, action: Action[Any, Any]) -> None:
    def run(self: Task, *args: Any, **kwargs: Any) -> str:
        try:
            task_id = UUID(self.request.id)
            others = watchers.others_of(self.request)
            if others:
                return watchers.tell(perform_all(_site(), action, [task_id, *others]))
            try:
                return perform(_site(), action, task_id)
            except NotClaimed:
                # What is no notice of ours was sent by a program without our app.
                if self.request.get(NOTICE_HEADER):
                    raise
                if not adopt(_site(), action, task_id, args, kwargs):
                    raise
                return perform(_site(), action, task_id)
        except (NotClaimed, Requeued, LeaseLost, ValueError):
            raise Ignore from None
        except (DatabaseUnavailable, Unrecorded) as error:
            # The row is still queued, or its lease runs out: the relay sees to it.
            _logger.warning("PostgreSQL is away", reason=str(error))
            raise Ignore from None

    run.__doc__ = action.doc
    made.task(
        run,
        bind=True,
        name=action.full_name,
        throws=(SutazaiError,),
        typing=False,
        shared=False,
        resultrepr_maxsize=4096,  # of a hand's; a single one is short
        Request=CheckedRequest,
    )


# --- what actions may ask of the system -----------------------------------------------------


class CelerySystem:
    """Implements `System` with heartbeat rows, Celery's remote control, and supervisord."""

    def workers(self) -> list[WorkerView]:
        """Return every live worker; see `System.workers`."""
        with db.transaction() as connection:
            live = connection.execute(statements.live_workers()).all()
            depths = {
                row.agent: row.depth
                for row in connection.execute(statements.status([w.agent for w in live]))
            }
        return [WorkerView(**row._asdict(), queued=depths[row.agent]) for row in live]

    def resize(self, agent: str, host: str, slots: int) -> int:
        """Grow or shrink the pool of one worker, within its agent's bounds."""
        declared = load().get(agent)
        if declared.pool == "solo":
            raise Unsupported(f"{agent} has a pool of exactly one slot.")
        slots = min(max(slots, declared.slots[0]), declared.slots[2])
        node = f"{declared.name}@{host}"
        now = next((w.slots for w in self.workers() if w.name == node), None)
        if now is None:
            raise Unsupported(f"{node} is not a live worker.")
        if slots != now:
            change = app.control.pool_grow if slots > now else app.control.pool_shrink
            reply = ask_workers(change, abs(slots - now), destination=[node])
            if not any("ok" in answer.get(node, {}) for answer in reply or []):
                raise Unsupported(f"{node} did not change its pool: {reply}")
        return slots

    def restart_pool(self, agent: str) -> None:
        """Restart the pools of an agent's workers; tasks in flight are rescued."""
        nodes = [w.name for w in self.workers() if w.agent == agent]
        if not nodes:
            raise Unsupported(f"{agent} has no live worker.")
        ask_workers(app.control.pool_restart, destination=nodes)

    def restart_process(self, agent: str) -> None:
        """Restart the worker process that supervisord runs on this machine."""
        supervisor = Supervisor(settings().home)
        if not supervisor.running():
            raise Unsupported("No supervisord runs this installation's processes.")
        supervisor.restart(f"worker-{agent}")


def ask_workers(ask: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Use a command of Celery's remote control and return the replies of two seconds.

    Raises `Unavailable` when the broker does not answer.
    """
    for is_last in (False, True):
        try:
            return ask(*arguments, **options, reply=True, timeout=2.0)
        except faults(app.connection_for_write()) as error:
            # A pooled connection may be from before a restart of the broker; the next one is new.
            if is_last:
                raise Unavailable(f"The broker does not answer: {error}") from error
    return None


# --- the worker -----------------------------------------------------------------------------

_state: dict[str, Any] = {}
"""This process's site, keeper and bell; forked children inherit the site."""


def bell() -> CeleryBell:
    """Return this process's bell."""
    if "bell" not in _state:
        _state["bell"] = CeleryBell(app)
    made: CeleryBell = _state["bell"]
    return made


def _site() -> Site:
    site: Site = _state["site"]
    return site


class KeeperStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Starts the keeper once the pool's processes have been forked."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **_: Any) -> None:
        agent = _agent_of(parent)
        host = parent.hostname.partition("@")[2]
        _state["site"] = Site(
            identity=Identity(parent.hostname, agent.name, host),
            reports=Reports(),
            agents=load().agents,
            system=CelerySystem(),
            bell=bell(),
        )

    def start(self, parent: Any) -> None:
        """Start watching."""
        site = _site()
        _state["keeper"] = keeper = Keeper(
            site.identity,
            site.reports,
            site.agents,
            slots=lambda: slots_of(parent),
            consuming=lambda: _is_consuming(parent, site.identity.agent),
            broker_answers=_broker_answers,
            each_beat=lambda: watchers.end_unwatched(parent),
        )
        keeper.start()

    def stop(self, parent: Any) -> None:
        """Go on watching: the pool, which stops after this step, still runs its tasks.

        A pool whose worker has failed may never stop: a loop that is broken hears nothing of it.
        """
        keeper: Keeper | None = _state.get("keeper")
        if keeper is not None and parent.exitcode:
            keeper.give_up()

    terminate = stop


@signals.worker_shutdown.connect(weak=False)
def _end_keeper(**_: Any) -> None:
    """Record that the worker has stopped, once its pool has."""
    keeper: Keeper | None = _state.get("keeper")
    if keeper is not None:
        keeper.stop()
    bell().close()


def _agent_of(parent: Any) -> Agent:
    """Return the agent whose queue a worker consumes; it must be exactly one."""
    own = [name for name in parent.app.amqp.queues.consume_from if name in load().agents]
    if len(own) == 1:
        return load().agents[own[0]]
    sys.exit(
        "A worker serves one agent's queue: use `sutazai worker AGENT`, or add "
        f"`-Q AGENT` (one of: {', '.join(load().agents)})."
    )


def _broker_answers() -> bool:
    """Whether the broker takes a new connection and answers on it within two seconds."""
    connection = app.connection_for_read(connect_timeout=2)
    options = connection.transport_options
    connection.transport_options = options | {"socket_timeout": 2, "socket_connect_timeout": 2}
    try:
        connection.default_channel  # noqa: B018 - reading it connects
    except faults(connection):
        return False
    finally:
        abandon(connection)
    return True


def _is_consuming(parent: Any, queue: str) -> bool:
    """Whether the agent's queue is consumed; the worker's own one does not count."""
    consumer = getattr(parent.consumer, "task_consumer", None)
    return consumer is None or any(consumed.name == queue for consumed in consumer.queues)


@signals.setup_logging.connect(weak=False)
def _set_up_logging(**_: Any) -> None:
    log.configure(settings().log_format, settings().log_level)
    for reference, why in load().faults.items():
        _logger.error("an agent cannot be imported", agent=reference, why=why)


@signals.celeryd_init.connect(weak=False)
def _prepare_worker(instance: Any, options: Mapping[str, Any], **_: Any) -> None:
    """Refuse a worker of no agent, and name one that has no name after its agent."""
    queues = options.get("queues") or ()
    name = queues.strip() if isinstance(queues, str) else next(iter(queues), "")
    node, _, host = instance.hostname.partition("@")
    if node == "celery" and name in load().agents:
        instance.hostname = f"{name}@{host}"
    if not name:
        sys.exit(
            "A worker serves one agent: use `sutazai worker AGENT`, "
            f"or add `-Q AGENT` (one of: {', '.join(load().agents)})."
        )


@signals.celeryd_after_setup.connect(weak=False)
def _consume_direct_queue(instance: Any, **_: Any) -> None:
    queues = instance.app.amqp.queues
    queues.select_add(direct_queue(instance.hostname, queues[_agent_of(instance).name]))


@signals.task_unknown.connect(weak=False)
def _refuse_unknown(message: Any, name: str, id: str, **_: Any) -> None:  # noqa: A002 - Celery's
    """Fail tasks of this worker's agent whose action nobody here knows; Celery only drops them."""
    agent, action = name.rpartition(".")[::2]
    if NOTICE_HEADER not in message.headers:
        return
    if agent != _site().identity.agent:
        return  # a notice on the wrong queue: the task's own worker may know the action
    try:
        load().get(agent).get(action)
    except UnknownAction as why:
        for task_id in (UUID(id), *watchers.others_of(message.headers)):
            with db.transaction() as connection:
                ended = lifecycle.refuse(connection, task_id, agent, action, why)
            redis.announce_ended(ended)


@signals.worker_shutting_down.connect(weak=False)
def _bound_the_drain(**_: Any) -> None:
    keeper: Keeper | None = _state.get("keeper")
    if keeper is not None:
        keeper.drain()


@signals.worker_process_init.connect(weak=False)
def _begin_child(**_: Any) -> None:
    if os.getpid() == _site().identity.pid:
        return  # the solo pool runs tasks in the worker's own process
    _state.pop("keeper", None)
    # Threads do not survive a fork, so the bell of a child is its own.
    _state.pop("bell", None)
    _state["site"] = dataclasses.replace(_site(), bell=bell())


app = _create()
