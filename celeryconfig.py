"""The only Celery settings of the system; addresses come from `sutazai.settings`.

They follow from one decision: a message is only a notice that a task waits in PostgreSQL. What
Celery does against the loss of messages is therefore not needed, and is what makes it slow.
"""

from kombu.entity import Exchange, Queue

from sutazai.settings import settings
from sutazai.tasks import load

_broker = settings().broker_url or "redis://127.0.0.1:0/"
_is_redis = not _broker.startswith("amqp")
_agents = load().agents

broker_url = _broker
broker_connection_retry_on_startup = True
# None: for ever. With the default of 100 a worker gives up during a long outage.
broker_connection_max_retries = None
broker_transport_options = (
    {
        # Rows make acknowledgements unnecessary, and they cost more than everything else on Redis.
        "ack_emulation": False,
        "priority_steps": list(range(10)),
        "queue_order_strategy": "priority",
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        # A connection that has fallen silent is given up after one to two of these.
        "health_check_interval": 5,
        "max_retries": 2,
    }
    if _is_redis
    else {
        # A notice that is lost is rung again; to wait for each one's receipt costs many times more.
        "confirm_publish": False,
        # A broker that is frozen must hold up nobody for long.
        "read_timeout": 3,
        "write_timeout": 3,
        # Whoever needs the broker tries again later; workers connect by a setting of their own.
        "max_retries": 0,
    }
)
broker_connection_timeout = 4 if _is_redis else 3
# RabbitMQ and its workers miss each other after two of these.
broker_heartbeat = 20

# One queue an agent, of its own name. A misspelt queue raises instead of being created.
task_create_missing_queues = False
task_queues = [
    Queue(
        name,
        Exchange("", type="direct"),
        routing_key=name,
        # A quorum queue has no priorities, and may be a virtual host's default.
        queue_arguments=None if _is_redis else {"x-max-priority": 9, "x-queue-type": "classic"},
    )
    for name in _agents
]
task_default_queue = next(iter(_agents), "celery")
task_default_exchange = ""

accept_content = ["json"]
task_serializer = "json"
result_serializer = "json"
enable_utc = True
timezone = "UTC"

# The lease recovers what a worker leaves behind; re-delivery would only double it.
task_acks_late = False
task_reject_on_worker_lost = False
task_ignore_result = True
result_backend = "sutazai.celery:TaskRows"
task_store_errors_even_if_ignored = False

worker_prefetch_multiplier = 4
# The default of 4 s ends children that start slowly on a busy machine, again and again.
worker_proc_alive_timeout = 60
worker_max_tasks_per_child = 10_000
worker_max_memory_per_child = 1_000_000
worker_pool_restarts = True
worker_hijack_root_logger = False
worker_redirect_stdouts = False
worker_send_task_events = False
worker_cancel_long_running_tasks_on_connection_loss = False

beat_scheduler = "sutazai.scheduler:PostgresScheduler"
beat_max_loop_interval = 5
# Entries as Celery has them: {"a-name": {"task": "<agent>.<action>", "schedule": 60}}, also with
# kwargs and options.priority. A schedule is a number of seconds, a timedelta or a crontab. Beat
# writes them into the table of schedules.
beat_schedule: dict[str, dict[str, object]] = {}
