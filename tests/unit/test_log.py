"""Log lines: one form for people, one for machines, with the task's fields on each."""

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from sutazai import log


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_json_lines_carry_the_fields_of_the_task_also_from_other_libraries(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.configure("json", "info")
    with log.fields(agent="probe", action="nap", task_id="1", attempt=2):
        log.get("ours").info("task succeeded", ran_s=0.5)
        logging.getLogger("library").warning("something %s", "happened")
    log.get("ours").info("outside")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["task succeeded", "something happened", "outside"]
    for line in lines[:2]:
        assert (line["agent"], line["action"], line["task_id"], line["attempt"]) == (
            *("probe", "nap", "1"),
            2,
        )
    assert "task_id" not in lines[2]
    assert all(line["timestamp"].endswith("Z") and line["level"] for line in lines)


def test_console_lines_show_a_plain_traceback_without_local_variables(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.configure("console", "info")
    secret = "hunter2"
    try:
        raise ValueError("broken")
    except ValueError:
        log.get("ours").exception("failed", task_id="1")
    printed = capsys.readouterr().err
    assert "ValueError: broken" in printed
    assert secret not in printed.replace("test_log", "")


def test_routine_lines_of_libraries_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("json", "info")
    logging.getLogger("celery.app.trace").info("Task x succeeded")
    logging.getLogger("celery.app.trace").error("Task x failed")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == [
        "Task x failed"
    ]


@pytest.mark.parametrize(("level", "told"), [("info", ["info"]), ("debug", ["debug", "info"])])
def test_details_are_told_at_the_level_that_asks_for_them(
    level: str, told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json", level)
    ours = log.get("ours")
    ours.debug("a detail")
    ours.info("what happened")
    assert [json.loads(line)["level"] for line in capsys.readouterr().err.splitlines()] == told
