"""The system as its users see it, on the machine's own hardware."""

import json
import os
import shutil
import signal
import subprocess
import time
from base64 import b64decode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import psycopg
import pytest
import redis
from celery import Celery

from tests.acceptance.conftest import (
    AGENTS,
    BIN,
    EXTRA,
    System,
    eventually,
    free_offset,
    start,
    stop,
)

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]


def _row(env_file: dict[str, str], query: str, *values: Any) -> tuple[Any, ...]:
    with psycopg.connect(env_file["SUTAZAI_DATABASE_URL"]) as connection:
        found = connection.execute(query, values).fetchone()
    assert found
    return tuple(found)


# --- the main job ---------------------------------------------------------------------------


@pytest.mark.parametrize("agent", [*AGENTS, *EXTRA])
def test_every_agent_is_healthy(system: System, agent: str) -> None:
    answer = system.client.get(system.url(agent, "/health"))
    health = answer.json()
    assert (answer.status_code, health["status"]) == (200, "healthy"), health
    [worker] = health["workers"]
    assert worker["id"].startswith(f"{agent}@")
    assert psutil.pid_exists(worker["pid"])
    assert worker["heartbeat_age_s"] < 8


def test_metrics_are_what_the_kernel_says(system: System, env_file: dict[str, str]) -> None:
    answer = system.process_task("hardware-resource-optimizer", "get_metrics", max_age_s=0)
    body = answer.json()
    assert (answer.status_code, body["status"]) == (200, "success"), body
    metrics = body["metrics"]
    meminfo = dict(
        line.split(":") for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    limit = (metrics["cgroup"] or {}).get("memory_max")
    kernel = int(meminfo["MemTotal"].split()[0]) * 1024
    assert metrics["memory_total"] == min(kernel, limit or kernel)
    assert metrics["cpu_count"] == len(os.sched_getaffinity(0)) or (
        metrics["cpu_count"] == os.cpu_count()
    )
    assert 0 <= metrics["cpu_percent"] <= 100
    root = shutil.disk_usage("/")
    assert root.total in [disk["total"] for disk in metrics["disk_usage"].values()]
    state, wait_s, run_s = _row(
        env_file,
        "SELECT state, wait_seconds, run_seconds FROM tasks WHERE task_id = %s",
        body["task_id"],
    )
    assert state == "succeeded"
    assert 0 <= wait_s < 10
    assert 0 < run_s < 20


def test_a_hundred_at_once_are_answered_within_seconds(system: System) -> None:
    def ask(_: int) -> float:
        began = time.monotonic()
        answer = system.process_task("hardware-resource-optimizer", "get_metrics")
        assert answer.json()["status"] == "success", answer.text
        return time.monotonic() - began

    with ThreadPoolExecutor(100) as pool:
        took = list(pool.map(ask, range(100)))
    # The figure to reach is 2 s; twice that leaves room for a machine that does other work.
    assert max(took) < 4


def test_every_other_agent_describes_itself_and_refuses_what_it_cannot(system: System) -> None:
    for agent in AGENTS:
        assert system.process_task(agent, "describe").json()["agent"] == agent
        refused = system.process_task(agent, "dance")
        assert refused.status_code == 422
        assert refused.json()["code"] == "unknown_action"
        assert "describe" in refused.json()["message"]


def test_the_example_package_works(system: System) -> None:
    answer = system.process_task("crawler", "fetch", url=system.url("crawler", "/docs"))
    assert answer.json()["status"] == "success", answer.text
    assert answer.json()["title"]
    missing = system.process_task("crawler", "fetch", url=system.url("crawler", "/nowhere"))
    assert missing.status_code == 500
    assert missing.json()["code"] == "task_failed"
    assert missing.json()["retryable"] is False


# --- what goes wrong with a task ------------------------------------------------------------


def test_a_flaky_task_is_retried(system: System, tmp_path: Path) -> None:
    task_id = system.submit("probe", "flaky", path=str(tmp_path / "mark"))
    task = system.task(task_id, wait_s=30)
    assert (task["state"], task["attempt"]) == ("succeeded", 2)
    assert [attempt["outcome"] for attempt in task["attempts"]] == ["failed", "succeeded"]


def test_bad_input_found_by_the_action_is_final(system: System) -> None:
    answer = system.process_task("probe", "refuse")
    assert (answer.status_code, answer.json()["code"]) == (500, "task_failed")
    assert "never good" in answer.json()["message"]
    assert answer.json()["retryable"] is False


def test_an_endless_task_ends_at_its_limit(system: System) -> None:
    began = time.monotonic()
    answer = system.process_task("probe", "spin")
    took_s = time.monotonic() - began
    assert (answer.status_code, answer.json()["code"]) == (504, "time_limit_exceeded")
    assert 2 < took_s < 8
    assert system.task(answer.json()["task_id"])["attempts"][0]["outcome"] == "timed_out"


def test_a_task_that_kills_its_process_three_times_is_poison(system: System) -> None:
    task_id = system.submit("probe", "crash")
    neighbours = [system.submit("probe", "nap", seconds=0.5) for _ in range(4)]
    task = eventually(
        lambda: (found := system.task(task_id))["state"] == "failed" and found, 60, "poison"
    )
    assert task["error"]["code"] == "poison"
    assert [attempt["outcome"] for attempt in task["attempts"]] == ["lost"] * 3
    for neighbour in neighbours:
        assert system.task(neighbour, wait_s=30)["state"] == "succeeded"


def test_a_child_does_the_work_of_its_parent(system: System) -> None:
    answer = system.process_task("probe", "pass_on", seconds=0.1)
    assert answer.json()["status"] == "success", answer.text
    parent = system.task(answer.json()["task_id"])
    assert [attempt["outcome"] for attempt in parent["attempts"]] == ["delegated"]
    children = system.client.get(
        system.url("probe", "/tasks"), params={"parent_id": parent["task_id"]}
    ).json()["tasks"]
    assert [(child["action"], child["state"]) for child in children] == [("nap", "succeeded")]


def test_revoking_a_running_task_cancels_it(system: System) -> None:
    task_id = system.submit("probe", "nap", seconds=60)
    eventually(lambda: system.task(task_id)["state"] == "running", 10, "running")
    assert system.run("celery", "-A", "sutazai", "control", "revoke", task_id).returncode == 0
    task = system.task(task_id, wait_s=20)
    assert task["state"] == "cancelled"


def test_kill_9_of_a_worker_and_its_pool(system: System) -> None:
    task_id = system.submit("probe", "nap", seconds=3)
    eventually(lambda: system.task(task_id)["state"] == "running", 10, "running")
    [before] = system.health("probe")["workers"]
    worker = psutil.Process(before["pid"])
    for process in [worker, *worker.children(recursive=True)]:
        process.kill()
    killed_at = time.monotonic()

    def noticed() -> bool:
        health = system.health("probe")
        return health["status"] == "unhealthy" or [
            worker["pid"] for worker in health["workers"]
        ] != [before["pid"]]

    eventually(noticed, 10, "the death is seen")
    eventually(lambda: system.health("probe")["status"] == "healthy", 20, "healthy again")
    task = system.task(task_id, wait_s=30)
    assert task["state"] == "succeeded"
    assert task["result"]["attempt"] == 2
    assert time.monotonic() - killed_at < 30


@pytest.mark.parametrize("name", ["relay", "beat", "front"])
def test_kill_9_of_any_other_process(system: System, name: str) -> None:
    process = system.program(name)
    process.kill()
    eventually(lambda: _is_back(system, name, process.pid), 20, f"{name} is back")
    eventually(lambda: _answers(system), 20, "the front answers")
    assert system.process_task("probe", "nap").json()["status"] == "success"


def _is_back(system: System, name: str, pid: int) -> bool:
    from sutazai.embedded import Supervisor

    [state] = [state for state in Supervisor(system.home).programs() if state.name == name]
    return state.state == "RUNNING" and state.pid != pid


def _answers(system: System) -> bool:
    try:
        return system.client.get(system.url("probe", "/health/live")).status_code == 200
    except Exception:
        return False


def test_nothing_is_lost_when_redis_forgets_everything(
    system: System, env_file: dict[str, str]
) -> None:
    tasks = [system.submit("probe", "nap", seconds=0.3) for _ in range(20)]
    redis.Redis.from_url(env_file["SUTAZAI_REDIS_URL"]).flushall()
    for task_id in tasks:
        assert system.task(task_id, wait_s=60)["state"] == "succeeded"


# --- the Celery command line and Flower -----------------------------------------------------


def test_celery_from_a_folder_with_a_celeryconfig_of_its_own(
    system: System, tmp_path: Path
) -> None:
    (tmp_path / "celeryconfig.py").write_text("raise RuntimeError('the wrong one')\n")
    ping = system.run("celery", "-A", "sutazai", "inspect", "ping", cwd=tmp_path)
    assert ping.returncode == 0, ping.stderr
    for agent in AGENTS:
        assert f"{agent}@" in ping.stdout
    assert f"{len(AGENTS) + len(EXTRA)} nodes online" in ping.stdout


def test_celery_inspect(system: System) -> None:
    def inspect(what: str) -> subprocess.CompletedProcess[str]:
        return system.run("celery", "-A", "sutazai", "inspect", what, "--json")

    with ThreadPoolExecutor() as pool:
        for found in pool.map(inspect, ["active", "stats", "registered", "reserved"]):
            assert found.returncode == 0, found.stderr
            assert len(json.loads(found.stdout)) == len(AGENTS) + len(EXTRA)


def test_celery_call_is_as_durable_as_a_post_and_its_result_is_read_from_the_row(
    system: System,
) -> None:
    called = system.run(
        "celery", "-A", "sutazai", "call", "probe.nap", "--kwargs", '{"seconds": 0.1}'
    )
    task_id = called.stdout.strip()
    assert system.task(task_id, wait_s=20)["state"] == "succeeded"
    result = system.run("celery", "-A", "sutazai", "result", task_id)
    assert "'attempt': 1" in result.stdout
    refused = system.run(
        "celery", "-A", "sutazai", "call", "probe.nap", "--kwargs", '{"seconds": "x"}'
    )
    assert refused.returncode != 0
    assert "seconds" in refused.stderr


def test_a_celery_worker_without_a_queue_is_refused(system: System) -> None:
    refused = system.run("celery", "-A", "sutazai", "worker")
    assert refused.returncode != 0
    assert "sutazai worker AGENT" in refused.stderr


def test_flower_shows_all_workers_and_tasks(system: System) -> None:
    base = f"http://127.0.0.1:{5555 + system.offset}"

    def workers() -> set[str]:
        found = system.client.get(f"{base}/api/workers", params={"refresh": "true"})
        return {name.partition("@")[0] for name in found.json()} if found.is_success else set()

    eventually(lambda: workers() >= set(AGENTS), 30, "Flower knows every worker")
    done: list[str] = []

    def saw_one() -> bool:
        # It may have begun to watch only now, and events come in batches.
        done.append(system.process_task("probe", "nap", seconds=0.05).json()["task_id"])
        found = system.client.get(f"{base}/api/tasks", params={"limit": 500}).json()
        return any(found[known]["state"] == "SUCCESS" for known in done if known in found)

    eventually(saw_one, 40, "Flower saw a task")


def test_flowers_task_api_and_its_buttons_are_durable(system: System) -> None:
    base = f"http://127.0.0.1:{5555 + system.offset}/api/task"
    applied = system.client.post(
        f"{base}/async-apply/probe.nap", json={"kwargs": {"seconds": 0.1}}
    ).json()
    assert system.task(applied["task-id"], wait_s=20)["state"] == "succeeded"
    forms: list[dict[str, str]] = [{}, {"terminate": "true"}]
    for form in forms:
        task_id = system.submit("probe", "nap", seconds=60)
        eventually(lambda task_id=task_id: system.task(task_id)["state"] == "running", 10)
        pressed = system.client.post(f"{base}/revoke/{task_id}", data=form)
        assert pressed.status_code == 200, pressed.text
        assert system.task(task_id, wait_s=20)["state"] == "cancelled"


def test_task_events_go_out_in_batches(system: System, env_file: dict[str, str]) -> None:
    batches: list[list[dict[str, Any]]] = []
    told: Counter[str] = Counter()
    with redis.Redis.from_url(env_file["SUTAZAI_REDIS_URL"]) as client, client.pubsub() as stream:
        stream.psubscribe("*celeryev/task.multi")
        tasks = {system.submit("probe", "nap", seconds=0) for _ in range(20)}

        def all_told() -> bool:
            message = stream.get_message(ignore_subscribe_messages=True, timeout=1)
            if message is not None:
                batch = json.loads(b64decode(json.loads(message["data"])["body"]))
                batches.append(batch)
                told.update(event["type"] for event in batch if event["uuid"] in tasks)
            return told["task-succeeded"] == 20

        eventually(all_told, 20, "Flower watches, so every task is told of")
    assert told["task-received"] == told["task-started"] == 20
    assert len(batches) < 20


# --- the command line -----------------------------------------------------------------------


def test_submit_and_its_exit_codes(system: System) -> None:
    submit = ("sutazai", "submit")
    commands = {
        "good": (*submit, "probe", "nap", "--param", "seconds=0.1"),
        "failing": (*submit, "probe", "refuse"),
        "ill-typed": (*submit, "probe", "nap", "-p", "seconds=x"),
        "nobody": (*submit, "nobody", "nap"),
        "late": (*submit, "probe", "nap", "-p", "seconds=6", "--wait", "0.5"),
        "queued": (*submit, "probe", "nap", "--no-wait"),
    }
    with ThreadPoolExecutor(2) as pool:
        ran = dict(
            zip(commands, pool.map(lambda name: system.run(*commands[name]), commands), strict=True)
        )
    codes = {name: done.returncode for name, done in ran.items()}
    assert codes == {
        "good": 0,
        "failing": 1,
        "ill-typed": 2,
        "nobody": 2,
        "late": 3,
        "queued": 0,
    }, {name: done.stderr for name, done in ran.items()}
    assert json.loads(ran["good"].stdout)["attempt"] == 1
    task_id = json.loads(ran["queued"].stdout)["task_id"]
    assert system.task(task_id, wait_s=20)["state"] == "succeeded"
    shown = system.run("sutazai", "tasks", "show", task_id, "--json")
    assert json.loads(shown.stdout)["state"] == "succeeded"
    listed = system.run("sutazai", "tasks", "list", "--agent", "probe", "--json")
    assert task_id in [task["task_id"] for task in json.loads(listed.stdout)]


def test_operating_queues_and_tasks_from_the_command_line(system: System) -> None:
    def run(*arguments: str) -> Any:
        done = system.run("sutazai", *arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    assert json.loads(run("queue", "pause", "probe", "--json"))[0]["paused"]
    submit = ("submit", "probe", "nap", "--no-wait", "--idempotency-key", "operate")
    first, again = (json.loads(run(*submit))["task_id"] for _ in range(2))
    assert first == again
    assert system.task(first, wait_s=1)["state"] == "queued"
    assert not json.loads(run("queue", "resume", "probe", "--json"))[0]["paused"]
    watched = run("tasks", "watch", first, "--json").splitlines()
    assert [json.loads(line)["event"] for line in watched][-1] == "result"
    [retried] = json.loads(run("tasks", "retry", first))["task_ids"]
    assert system.task(retried, wait_s=20)["retry_of"] == first
    sleeping = system.submit("probe", "nap", seconds=60)
    run("tasks", "cancel", sleeping)
    assert system.task(sleeping, wait_s=20)["state"] == "cancelled"
    assert system.run("sutazai", "tasks", "cancel", sleeping).returncode == 1


def test_a_message_of_a_program_without_our_app_is_adopted(
    system: System, env_file: dict[str, str]
) -> None:
    task_id = str(uuid4())
    with Celery(broker=env_file["SUTAZAI_BROKER_URL"]) as foreign:
        foreign.send_task("probe.nap", kwargs={"seconds": 0.1}, queue="probe", task_id=task_id)
        foreign.send_task("probe.nap", kwargs={"seconds": "x"}, queue="probe")

    def task() -> Any:
        found = system.client.get(system.url("probe", f"/tasks/{task_id}"))
        return found.json() if found.status_code == 200 else None

    eventually(lambda: (found := task()) and found["state"] == "succeeded", 20, "it was adopted")
    assert task()["attempt"] == 1


def test_status_and_doctor(system: System) -> None:
    status = eventually(
        lambda: (found := system.run("sutazai", "status", "--json")).returncode == 0 and found,
        30,
        "status says all is healthy",
    )
    assert {row["agent"] for row in json.loads(status.stdout)} == {*AGENTS, *EXTRA}
    doctor = system.run("sutazai", "doctor", "--json")
    assert doctor.returncode == 0, doctor.stdout
    levels = {line["subject"]: line["level"] for line in json.loads(doctor.stdout)}
    assert levels["postgresql"] == levels["migrations"] == levels["redis"] == "ok"


def test_agents_actions_and_logs(system: System) -> None:
    listed = json.loads(system.run("sutazai", "agents", "--json").stdout)
    assert {agent["agent"] for agent in listed["agents"]} == {*AGENTS, *EXTRA}
    actions = json.loads(
        system.run("sutazai", "actions", "hardware_resource_optimizer", "--json").stdout
    )
    assert "get_metrics" in [action["action"] for action in actions]
    logged = system.run("sutazai", "logs", "probe")
    assert "task_id=" in logged.stdout
    assert "attempt=" in logged.stdout


def test_an_agent_that_cannot_be_imported_is_named_with_its_line(
    system: System, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("from sutazai.agent import Agent\n\nagent = Agent('X')\n")
    env = system.env | {"SUTAZAI_AGENTS": "broken:agent", "PYTHONPATH": str(tmp_path)}
    doctor = subprocess.run(
        [BIN / "sutazai", "doctor"], env=env, capture_output=True, text=True, check=False
    )
    assert doctor.returncode == 1
    assert "broken.py:3" in doctor.stdout


def test_restart_drains_and_brings_another_process(system: System) -> None:
    before = system.program("worker-probe").pid
    task_id = system.submit("probe", "nap", seconds=1)
    eventually(lambda: system.task(task_id)["state"] == "running", 10, "running")
    assert system.run("sutazai", "restart", "probe").returncode == 0
    assert system.program("worker-probe").pid != before
    task = system.task(task_id, wait_s=20)
    assert (task["state"], task["attempt"]) == ("succeeded", 1)


def test_a_long_task_is_put_back_when_its_worker_stops_and_charged_nothing(
    system: System,
) -> None:
    task_id = system.submit("probe", "sleep_through", seconds=60)
    eventually(lambda: system.task(task_id)["state"] == "running", 10, "running")
    system.program("worker-probe").terminate()
    task = eventually(
        lambda: (found := system.task(task_id))["attempt"] == 2 and found, 60, "second attempt"
    )
    assert task["attempts"][0]["outcome"] == "released"
    assert system.client.post(system.url("probe", f"/tasks/{task_id}/cancel")).status_code == 202
    assert system.task(task_id, wait_s=30)["state"] == "cancelled"


def test_an_action_that_exits_has_failed(system: System) -> None:
    answer = system.process_task("probe", "leave")
    assert (answer.status_code, answer.json()["code"]) == (500, "task_failed")


def test_a_cancelled_consumer_is_told(system: System) -> None:
    control = ("celery", "-A", "sutazai", "control")
    assert system.run(*control, "cancel_consumer", "crawler").returncode == 0
    eventually(lambda: system.health("crawler")["status"] == "degraded", 10, "degraded")
    assert "consumer cancelled" in system.health("crawler")["reasons"][0]
    assert system.run(*control, "add_consumer", "crawler").returncode == 0
    eventually(lambda: system.health("crawler")["status"] == "healthy", 10, "healthy")


# --- schedules (late, so that the second sample has come meanwhile) -------------------------


def test_beat_samples_the_host_every_30_seconds(system: System, env_file: dict[str, str]) -> None:
    def ticks() -> list[float]:
        with psycopg.connect(env_file["SUTAZAI_DATABASE_URL"]) as connection:
            found = connection.execute(
                "SELECT tick_at FROM tasks WHERE action = 'sample' AND scheduled_by IS NOT NULL "
                "AND state = 'succeeded' ORDER BY tick_at"
            ).fetchall()
        return [row[0].timestamp() for row in found]

    def apart() -> set[float]:
        found = ticks()
        return {after - before for before, after in pairwise(found)}

    eventually(lambda: 30 in apart(), 100, "two samples 30 s apart")
    assert all(tick % 30 == 0 for tick in ticks())
    (count,) = _row(env_file, "SELECT count(*) FROM hardware_samples")
    assert count >= 2
    latest = redis.Redis.from_url(env_file["SUTAZAI_REDIS_URL"]).hget("system:metrics", "current")
    assert json.loads(str(latest, "utf-8"))["memory_total"] > 0  # type: ignore[arg-type]


# --- starting and stopping ------------------------------------------------------------------


def test_a_taken_port_is_named_before_anything_starts(system: System, tmp_path: Path) -> None:
    env = system.env | {"SUTAZAI_HOME": str(tmp_path / ".sutazai")}
    refused = subprocess.run(
        [BIN / "sutazai", "up", "--port-offset", str(system.offset)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 1
    assert f"port {8002 + system.offset}" in refused.stderr
    assert "pid " in refused.stderr
    assert "--port-offset" in refused.stderr
    assert not (tmp_path / ".sutazai" / "postgresql").exists()


def test_a_second_home_starts_survives_kill_9_of_everything_and_leaves_nothing_behind(
    system: System, tmp_path: Path
) -> None:
    home = tmp_path / ".sutazai"
    agents = ("--agents", "task-assignment-coordinator", "--no-flower")
    second = start(home, free_offset(system.offset + 500), *agents)
    task_id = second.process_task("task-assignment-coordinator", "describe").json()["task_id"]
    tree = [psutil.Process(second.process.pid)]
    tree += tree[0].children(recursive=True)
    for process in tree:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(tree, timeout=10)
    stop(second)

    again = start(home, second.offset, *agents)
    kept = again.client.get(again.url("task-assignment-coordinator", f"/tasks/{task_id}"))
    assert kept.json()["state"] == "succeeded"
    tree = psutil.Process(again.process.pid).children(recursive=True)
    assert tree
    assert stop(again) == 0
    _, alive = psutil.wait_procs(tree, timeout=5)
    assert not alive


def test_given_urls_mean_no_servers_of_our_own(
    system: System, env_file: dict[str, str], tmp_path: Path
) -> None:
    urls = {name: env_file[name] for name in ("SUTAZAI_DATABASE_URL", "SUTAZAI_BROKER_URL")}
    other = start(
        tmp_path / ".sutazai",
        free_offset(system.offset + 500),
        *("--agents", "ai-metrics-exporter", "--no-flower"),
        **urls,
    )
    stop(other)
    assert not (tmp_path / ".sutazai" / "postgresql").exists()
