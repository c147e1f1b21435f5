"""The OpenAPI document of a front, derived from the declarations.

`POST /process` is documented as one schema an action, told apart by the field `action`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel

from sutazai.agent import Action, Agent
from sutazai.api.batch import MAX_ITEMS
from sutazai.api.process import ProcessQuery
from sutazai.api.retry import RetryBody
from sutazai.api.schedules import SchedulesQuery
from sutazai.api.tasks import TasksQuery, WaitQuery
from sutazai.replay import Filter
from sutazai.schedule import Definition, NewSchedule, ScheduleChange
from sutazai.state import Outcome, State
from sutazai.submission import Options

Schema = dict[str, Any]

_TEXT, _NUMBER, _INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_INSTANT = {"type": "string", "format": "date-time"}
_ID = {"type": "string", "format": "uuid"}
_OBJECT = {"type": "object"}


def describe(agent: Agent) -> Schema:
    """Return the OpenAPI 3.1 document of an agent's front."""
    schemas: dict[str, Schema] = {"Error": _error(), "Task": _task(), "Accepted": _accepted()}
    paths = {
        "/process": {"post": _process(agent, schemas)},
        "/tasks": {"post": _create(agent, schemas), "get": _list(schemas)},
        "/tasks/batch": {"post": _batch(schemas)},
        "/tasks/retry": {"post": _retry_many(schemas)},
        "/tasks/{task_id}": {"get": _show(schemas)},
        "/tasks/{task_id}/events": {"get": _events()},
        "/tasks/{task_id}/cancel": {"post": _cancel()},
        "/tasks/{task_id}/retry": {"post": _retry(schemas)},
        "/queue": {"get": _queue("show_queue", "How does the queue stand?", "Now.")},
        "/queue/pause": {
            "post": _queue("pause_queue", "Pause", "New tasks are accepted and none is started.")
        },
        "/queue/drain": {
            "post": _queue("drain_queue", "Drain", "No new tasks; those that are there are done.")
        },
        "/queue/resume": {
            "post": _queue("resume_queue", "Resume", "Tasks are accepted and started again.")
        },
        **_schedules(schemas),
        "/actions": {"get": _plain("List the actions", "What the agent can do.")},
        "/health": {"get": _health()},
        "/health/live": {"get": _plain("Is the process alive?", "It is.")},
        "/health/ready": {
            "get": _plain("Can work be accepted?", "It can.") | _responses(_OBJECT, 503)
        },
        "/metrics": {"get": _metrics()},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": agent.name, "description": agent.doc, "version": _version()},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _version() -> str:
    try:
        return version("sutazai")
    except PackageNotFoundError:
        return "0"


def _process(agent: Agent, schemas: dict[str, Schema]) -> Schema:
    requests, results = {}, {}
    for action in agent.actions.values():
        requests[action.name] = _add_request(action, schemas, agent.default_action == action.name)
        results[action.name] = _add_result(action, schemas)
    operation = _operation(
        "process",
        "Perform an action",
        "The body is flat: the action's name beside its parameters. The answer comes when the "
        "task has ended, at most 30 s later (the header `Prefer: wait=N` sets another bound, "
        "`Prefer: respond-async` none); after that 202 says where to find the task, which goes on.",
        [*_parameters(ProcessQuery, schemas), _PREFER, _KEY],
    )
    operation["requestBody"] = _body(_one_of(requests))
    return operation | _responses(
        _one_of(results), 400, 408, 409, 413, 415, 422, 429, 500, 503, 504, accepted=True
    )


def _create(agent: Agent, schemas: dict[str, Schema]) -> Schema:
    options = _lift(Options.model_json_schema(), "Options", schemas)
    schemas["Submission"] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["action"],
        "properties": {
            "action": {"type": "string", "enum": list(agent.actions)},
            "params": {"type": "object", "description": "The action's parameters."},
            "options": options,
        },
    }
    operation = _operation("create_task", "Hand over a task", "Answers at once.", [_KEY])
    operation["requestBody"] = _body(_ref("Submission"))
    return operation | _responses(None, 400, 408, 409, 413, 415, 422, 429, 503, accepted=True)


def _batch(schemas: dict[str, Schema]) -> Schema:
    operation = _operation("create_tasks", "Hand over many tasks", "All or none, ids in order.")
    operation["requestBody"] = _body(
        {"type": "array", "items": _ref("Submission"), "minItems": 1, "maxItems": MAX_ITEMS}
    )
    schemas["AcceptedMany"] = _properties(
        status={"const": "accepted"}, task_ids={"type": "array", "items": _ID}
    )
    return _accepts_many(operation)


def _retry_many(schemas: dict[str, Schema]) -> Schema:
    operation = _operation(
        "retry_tasks",
        "Try failed tasks again",
        "Makes new tasks of those that the filter finds, so many a second; a task that was "
        "retried before is left out.",
    )
    body = _lift(Filter.model_json_schema(), "Filter", schemas)
    operation["requestBody"] = _body(body) | {"required": False}
    return _accepts_many(operation)


def _accepts_many(operation: Schema) -> Schema:
    operation |= _responses(None, 400, 404, 408, 409, 413, 415, 422, 429, 503)
    operation["responses"]["202"] = _content("Accepted.", _ref("AcceptedMany"))
    return operation


def _retry(schemas: dict[str, Schema]) -> Schema:
    operation = _operation(
        "retry_task", "Try a task again", "Makes a new task of one that ended.", [_TASK_ID, _KEY]
    )
    body = _lift(RetryBody.model_json_schema(), "RetryBody", schemas)
    operation["requestBody"] = _body(body) | {"required": False}
    return operation | _responses(None, 400, 404, 408, 409, 413, 415, 422, 429, 503, accepted=True)


def _events() -> Schema:
    operation = _operation(
        "stream_events",
        "Follow a task",
        "Server-Sent Events `state`, `progress`, `log` and, at the end, `result`. Resumable with "
        "`Last-Event-ID`; 204 when nothing more will come.",
        [_TASK_ID, {"name": "Last-Event-ID", "in": "header", "schema": _TEXT}],
    )
    operation |= _responses(None, 404, 422, 503)
    # A stream is described by what it repeats: one event.
    kinds = {"type": "string", "enum": ["state", "progress", "log", "result"]}
    event = _properties(id=_TEXT, event=kinds, data={**_TEXT, "description": "A JSON object."})
    events = {"text/event-stream": {"schema": event}}
    operation["responses"]["200"] = {"description": "Events.", "content": events}
    operation["responses"]["204"] = {"description": "The task had ended; nothing more comes."}
    return operation


def _queue(name: str, summary: str, description: str) -> Schema:
    body = _properties(
        agent=_TEXT,
        paused={"type": "boolean"},
        draining={"type": "boolean"},
        depth=_INTEGER,
        oldest_age_s=_nullable(_NUMBER),
        held=_INTEGER,
        running=_INTEGER,
        slots=_INTEGER,
        workers=_INTEGER,
        limit=_nullable(_INTEGER),
    )
    return _operation(name, summary, description) | _responses(body, 503)


def _schedules(schemas: dict[str, Schema]) -> dict[str, Schema]:
    """Return the paths of schedules."""
    for model in (NewSchedule, ScheduleChange):
        schemas[model.__name__] = _lift(model.model_json_schema(), model.__name__, schemas)
    own = _lift(Definition.model_json_schema(), "Schedule", schemas)["properties"]
    instant = _nullable(_INSTANT)
    more = {"last_tick_at": instant, "next_tick_at": _INSTANT, "missed": _INTEGER}
    schemas["Schedule"] = _properties(
        name=_TEXT, source=_TEXT, agent=_TEXT, **own, **more, skipped=_INTEGER
    )
    page = _properties(schedules={"type": "array", "items": _ref("Schedule")})
    listed = _operation(
        "list_schedules", "List schedules", "By name.", _parameters(SchedulesQuery, schemas)
    )
    added = _operation("add_schedule", "Add a schedule", "For an action of this agent.")
    added |= {"requestBody": _body(_ref("NewSchedule"))}
    added |= _responses(None, 400, 408, 409, 413, 415, 422, 503)
    added["responses"]["201"] = _content("Added.", _ref("Schedule"))
    shown = _operation("show_schedule", "Show a schedule", "Of any agent.", [_SCHEDULE])
    changed = _operation(
        "change_schedule",
        "Change, pause or resume a schedule",
        "One that is declared elsewhere can only be paused and resumed.",
        [_SCHEDULE],
    ) | {"requestBody": _body(_ref("ScheduleChange"))}
    removed = _operation("remove_schedule", "Remove a schedule", "Its tasks stay.", [_SCHEDULE])
    removed |= _responses(None, 404, 409, 503)
    removed["responses"]["204"] = {"description": "Removed."}
    run = _operation(
        "run_schedule", "Run a schedule now", "Makes one task beside the ticks.", [_SCHEDULE, _KEY]
    )
    return {
        "/schedules": {"get": listed | _responses(page, 422, 503), "post": added},
        "/schedules/{name}": {
            "get": shown | _responses(_ref("Schedule"), 404, 503),
            "patch": changed | _responses(_ref("Schedule"), 400, 404, 408, 409, 413, 415, 422, 503),
            "delete": removed,
        },
        "/schedules/{name}/run": {
            "post": run | _responses(None, 404, 409, 422, 429, 503, accepted=True)
        },
    }


def _list(schemas: dict[str, Schema]) -> Schema:
    page = _properties(tasks={"type": "array", "items": _ref("Task")}, next_cursor=_nullable(_TEXT))
    operation = _operation(
        "list_tasks", "List tasks", "Newest first.", _parameters(TasksQuery, schemas)
    )
    return operation | _responses(page, 422, 503)


def _show(schemas: dict[str, Schema]) -> Schema:
    parameters = [_TASK_ID, *_parameters(WaitQuery, schemas)]
    operation = _operation(
        "show_task", "Show a task", "Of any agent, at once or when it has ended.", parameters
    )
    return operation | _responses(_ref("Task"), 404, 422, 503)


def _cancel() -> Schema:
    operation = _operation(
        "cancel_task",
        "Cancel a task",
        "200 when done, 202 while it is being carried out, 409 when the task had ended.",
        [_TASK_ID],
    )
    operation |= _responses(_ref("Task"), 404, 409, 503)
    operation["responses"]["202"] = _content("It is being carried out.", _ref("Task"))
    return operation


def _health() -> Schema:
    body = _properties(
        status={"type": "string", "enum": ["healthy", "degraded", "unhealthy"]},
        agent=_TEXT,
        port=_INTEGER,
        timestamp=_INSTANT,
        workers={"type": "array", "items": _OBJECT},
        queue=_OBJECT,
        checks=_OBJECT,
        reasons={"type": "array", "items": _TEXT},
    )
    operation = _operation("health", "How does the agent do?", "Reasons are sentences.")
    operation |= _responses(body)
    operation["responses"]["503"] = _content("Unhealthy.", body)
    return operation


def _metrics() -> Schema:
    operation = _operation("metrics", "Metrics", "Prometheus text or OpenMetrics, by `Accept`.")
    content = {"text/plain": {"schema": _TEXT}, "application/openmetrics-text": {"schema": _TEXT}}
    operation["responses"] = {"200": {"description": "Metrics.", "content": content}}
    return operation


def _add_request(action: Action[Any, Any], schemas: dict[str, Schema], default: bool) -> Schema:
    """Add what the body looks like for one action, and return a reference to it."""
    name = f"{_pascal(action.name)}Request"
    schema = _lift(action.params_schema, name, schemas)
    schema["title"] = action.name
    schema["description"] = action.doc
    schema["properties"] = {
        "action": {"const": action.name},
        **schema.get("properties", {}),
        "request_id": {"type": "string", "description": "The same as Idempotency-Key."},
    }
    schema["required"] = [*([] if default else ["action"]), *schema.get("required", [])]
    schemas[name] = schema
    return _ref(name)


def _add_result(action: Action[Any, Any], schemas: dict[str, Schema]) -> Schema:
    """Add what the answer looks like for one action, and return a reference to it."""
    name = f"{_pascal(action.name)}Answer"
    schema = _lift(action.result_schema, name, schemas)
    head = {"status": {"const": "success"}, "task_id": _ID, "action": {"const": action.name}}
    schema["title"] = f"{action.name} answer"
    schema["properties"] = head | schema.get("properties", {})
    schema["required"] = [*head, *schema.get("required", [])]
    schemas[name] = schema
    return _ref(name)


def _lift(schema: Schema, owner: str, schemas: dict[str, Schema]) -> Schema:
    """Return a copy whose definitions stand among the components, under names of their owner."""

    def copy(part: Any) -> Any:
        if isinstance(part, list):
            return [copy(item) for item in part]
        if not isinstance(part, dict):
            return part
        copied = {key: copy(value) for key, value in part.items() if key != "$defs"}
        reference = copied.get("$ref")
        if isinstance(reference, str):
            copied["$ref"] = reference.replace("#/$defs/", f"#/components/schemas/{owner}.")
        mapping = copied.get("mapping")
        if isinstance(mapping, dict):
            copied["mapping"] = {
                key: str(target).replace("#/$defs/", f"#/components/schemas/{owner}.")
                for key, target in mapping.items()
            }
        return copied

    for name, definition in schema.get("$defs", {}).items():
        schemas[f"{owner}.{name}"] = copy(definition)
    copied: Schema = copy(schema)
    return copied


def _parameters(model: type[BaseModel], schemas: dict[str, Schema]) -> list[Schema]:
    schema = _lift(model.model_json_schema(), model.__name__, schemas)
    return [
        {
            "name": name,
            "in": "query",
            "description": part.pop("description", ""),
            "schema": part,
        }
        for name, part in schema["properties"].items()
    ]


# --- parts of it ----------------------------------------------------------------------------

_TASK_ID = {"name": "task_id", "in": "path", "required": True, "schema": _ID}

_SCHEDULE = {"name": "name", "in": "path", "required": True, "schema": _TEXT}

_PREFER = {
    "name": "Prefer",
    "in": "header",
    "description": "`wait=N` (seconds, at most 300) or `respond-async`.",
    "schema": _TEXT,
}

_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "1 to 255 visible ASCII characters; the same key is the same task.",
    "schema": _TEXT,
}

_REFUSALS = {
    400: "The body is not acceptable as JSON.",
    404: "There is no such task, schedule or agent.",
    408: "The body did not arrive in time.",
    409: "The task was cancelled, or its state does not admit this.",
    413: "The body is larger than 1 MiB.",
    415: "The body is not declared as JSON.",
    422: "The input is refused; `details` names the fields at fault.",
    429: "The queue is full; `Retry-After` says when to try again.",
    500: "The task failed (`task_id` is set), or the front did.",
    503: "PostgreSQL is away; nothing was accepted. `Retry-After` says when to try again.",
    504: "The task exceeded its time limit or deadline.",
}


def _operation(
    name: str, summary: str, description: str, parameters: list[Schema] | None = None
) -> Schema:
    return {
        "operationId": name,
        "summary": summary,
        "description": description,
        "parameters": parameters or [],
    }


def _plain(summary: str, description: str) -> Schema:
    name = summary.lower().replace(" ", "_").rstrip("?")
    return _operation(name, summary, description) | _responses(_OBJECT)


def _responses(schema: Schema | None, *refusals: int, accepted: bool = False) -> Schema:
    responses = {}
    if schema is not None:
        responses["200"] = _content("Done.", schema)
    if accepted:
        responses["202"] = _content("Accepted; the task goes on.", _ref("Accepted"))
    for status in refusals:
        responses[str(status)] = _content(_REFUSALS[status], _ref("Error"))
    return {"responses": responses}


def _content(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _body(schema: Schema) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _one_of(references: dict[str, Schema]) -> Schema:
    return {
        "oneOf": list(references.values()),
        "discriminator": {
            "propertyName": "action",
            "mapping": {name: reference["$ref"] for name, reference in references.items()},
        },
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _properties(**properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _pascal(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _error() -> Schema:
    schema = _properties(
        status={"const": "error"},
        code={"type": "string", "description": "For programs, snake_case."},
        message={"type": "string", "description": "A sentence that says what to do."},
        details={"type": "array", "items": {}},
        task_id=_nullable(_ID),
    )
    schema["properties"]["retryable"] = {
        "type": "boolean",
        "description": "For a failed task: whether a new one may help.",
    }
    return schema


def _accepted() -> Schema:
    return _properties(
        status={"const": "accepted"},
        task_id=_ID,
        state={"type": "string", "enum": [*State]},
        queue_position={"anyOf": [_INTEGER, {"type": "null"}], "description": "An estimate."},
        links=_OBJECT,
    )


def _task() -> Schema:
    error = _properties(code=_TEXT, message=_TEXT, retryable={"type": "boolean"})
    attempt = _properties(
        attempt=_INTEGER,
        worker=_nullable(_TEXT),
        started_at=_nullable(_INSTANT),
        ended_at=_nullable(_INSTANT),
        outcome=_nullable({"type": "string", "enum": [*Outcome]}),
        error=_nullable(error),
    )
    return _properties(
        task_id=_ID,
        agent=_TEXT,
        action=_TEXT,
        state={"type": "string", "enum": [*State]},
        priority=_INTEGER,
        params=_OBJECT,
        result=_nullable(_OBJECT),
        error=_nullable(error),
        progress=_nullable(_properties(fraction=_NUMBER, message=_TEXT)),
        attempt=_INTEGER,
        max_attempts=_INTEGER,
        parent_id=_nullable(_ID),
        retry_of=_nullable(_ID),
        scheduled_by=_nullable(_TEXT),
        labels=_OBJECT,
        idempotency_key=_nullable(_TEXT),
        created_at=_INSTANT,
        run_at=_INSTANT,
        started_at=_nullable(_INSTANT),
        finished_at=_nullable(_INSTANT),
        deadline_at=_nullable(_INSTANT),
        cancel_requested_at=_nullable(_INSTANT),
        wait_seconds=_nullable(_NUMBER),
        run_seconds=_nullable(_NUMBER),
        attempts={"type": "array", "items": attempt},
        links=_OBJECT,
    )
