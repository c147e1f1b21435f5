"""Every error the system raises on purpose; each class knows its HTTP status and its code.

SutazaiError                     500 internal_error
├── ConfigurationError               a bad setting: stops the start with one line
├── DeclarationError                 a bad agent: refused at import, with file and line
├── MalformedJSON                400 malformed_json
├── NotFound                     404 not_found
│   ├── TaskNotFound             404 task_not_found
│   ├── ScheduleNotFound         404 schedule_not_found
│   └── UnknownAgent             404 unknown_agent
├── MethodNotAllowed             405 method_not_allowed
├── Conflict                     409 conflict
│   ├── QueueDraining            409 queue_draining
│   └── KeyBusy                  409 concurrency_key_busy
├── PayloadTooLarge              413 payload_too_large
├── UnsupportedMediaType         415 unsupported_media_type
├── InvalidInput                 422 invalid_input       repeating it will not help
│   ├── UnknownAction            422 unknown_action
│   └── KeyReused                422 idempotency_key_reused
├── QueueFull                    429 queue_full          repeating it later will help
├── Unavailable                  503 unavailable         repeating it may help
│   └── DatabaseUnavailable      503 database_unavailable
│       └── DatabaseBusy         503 database_unavailable    it is there, and somebody has a lock
│           └── Deadlock         503 database_unavailable    rolled back: at once again
├── Unsupported                  501 unsupported         this installation cannot do that
├── LeaseLost                        this attempt is no longer the task's current one
└── TaskFailed                   500 task_failed         how an accepted task ended
    ├── Poison                   500 poison
    ├── WorkerLost               500 worker_lost
    ├── InvalidResult            500 invalid_result
    ├── TimeLimitExceeded        504 time_limit_exceeded
    ├── DeadlineExceeded         504 deadline_exceeded
    └── TaskCancelled            409 task_cancelled
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar


class SutazaiError(Exception):
    """Root of the tree: an internal error unless a subclass says otherwise."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", *, details: Sequence[Any] = ()) -> None:
        """Take the sentence for the user and, where there are several faults, their list."""
        super().__init__(message or (self.__doc__ or "").splitlines()[0])
        self.details = list(details)


class ConfigurationError(SutazaiError):
    """A setting is wrong or missing."""

    code = "configuration_error"


class DeclarationError(SutazaiError):
    """The declaration of an agent or of one of its actions is wrong."""

    code = "declaration_error"


class MalformedJSON(SutazaiError):
    """The body is not acceptable as JSON."""

    status = 400
    code = "malformed_json"


class NotFound(SutazaiError):
    """There is nothing under this address."""

    status = 404
    code = "not_found"


class TaskNotFound(NotFound):
    """No task has this id."""

    code = "task_not_found"


class ScheduleNotFound(NotFound):
    """No schedule has this name."""

    code = "schedule_not_found"


class UnknownAgent(NotFound):
    """No agent has this name."""

    code = "unknown_agent"


class MethodNotAllowed(SutazaiError):
    """The address exists, but not for this method."""

    status = 405
    code = "method_not_allowed"


class Conflict(SutazaiError):
    """The request does not fit the present state."""

    status = 409
    code = "conflict"


class QueueDraining(Conflict):
    """The queue drains: it takes no new tasks until it is resumed."""

    code = "queue_draining"


class KeyBusy(Conflict):
    """A task with this concurrency key has not ended yet."""

    code = "concurrency_key_busy"


class QueueFull(SutazaiError):
    """The queue is full; try again later."""

    status = 429
    code = "queue_full"
    retryable = True


class PayloadTooLarge(SutazaiError):
    """The body is larger than is accepted."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(SutazaiError):
    """The body is not declared as JSON."""

    status = 415
    code = "unsupported_media_type"


class InvalidInput(SutazaiError):
    """The input is refused; repeating it will not help."""

    status = 422
    code = "invalid_input"


class UnknownAction(InvalidInput):
    """The agent has no action of this name."""

    code = "unknown_action"


class KeyReused(InvalidInput):
    """This idempotency key was used for a different request; use a new one."""

    code = "idempotency_key_reused"


class Unavailable(SutazaiError):
    """Something that is needed does not answer; repeating the request may help."""

    status = 503
    code = "unavailable"
    retryable = True


class DatabaseUnavailable(Unavailable):
    """PostgreSQL does not answer."""

    code = "database_unavailable"


class DatabaseBusy(DatabaseUnavailable):
    """PostgreSQL did not answer in time; try again."""


class Deadlock(DatabaseBusy):
    """Two transactions waited for each other, and this one was rolled back; try again."""


class Unsupported(SutazaiError):
    """This installation cannot do that."""

    status = 501
    code = "unsupported"


class LeaseLost(SutazaiError):
    """This attempt is no longer the current one of its task; its outcome is refused."""

    code = "lease_lost"


class TaskFailed(SutazaiError):
    """The action raised an error."""

    code = "task_failed"


class Poison(TaskFailed):
    """The task killed its worker process three times and is not tried again."""

    code = "poison"


class WorkerLost(TaskFailed):
    """The worker died while the task ran, and the action must not run twice."""

    code = "worker_lost"
    retryable = True


class InvalidResult(TaskFailed):
    """The action returned something that is not a valid result."""

    code = "invalid_result"


class TimeLimitExceeded(TaskFailed):
    """The task ran longer than its time limit."""

    status = 504
    code = "time_limit_exceeded"
    retryable = True


class DeadlineExceeded(TaskFailed):
    """The task's deadline passed before it could end."""

    status = 504
    code = "deadline_exceeded"


class TaskCancelled(TaskFailed):
    """The task was cancelled."""

    status = 409
    code = "task_cancelled"


def _tree(root: type[SutazaiError]) -> Iterator[type[SutazaiError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def by_code(code: str, default: type[SutazaiError] = TaskFailed) -> type[SutazaiError]:
    """Return the class whose code this is, or the default for one that is not in the tree."""
    return next((cls for cls in _tree(SutazaiError) if cls.code == code), default)
