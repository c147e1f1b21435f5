"""The end of a pool's process, noticed when it happens.

The pipe that tells Celery of it closes a moment before the process can be waited for. Celery looks
once, finds it alive, and then not before its next round, which is up to 5 s later: until then the
pool is one process short, and a notice that was handed to the dead one waits.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps

FIRST_LOOK_S = 0.01
LAST_LOOK_S = 1.0
"""The pauses between looks double; then Celery's own round is near."""


class Reaping(bootsteps.StartStopStep):  # type: ignore[misc]
    """Looks again for a process whose end was announced before it had ended."""

    requires = ("celery.worker.components:Pool",)

    def start(self, parent: Any) -> None:
        """Come between the announcement and the pool; before the event loop knows of either."""
        pool: Any = getattr(parent.pool, "_pool", None)
        if not hasattr(pool, "_event_process_exit"):
            return  # no pool of processes on an event loop
        look_once = pool._event_process_exit

        def look(hub: Any, process: Any, pause_s: float = FIRST_LOOK_S) -> None:
            if process.exitcode is not None:
                pool.maintain_pool()
            elif pause_s <= LAST_LOOK_S:
                hub.call_later(pause_s, look, hub, process, 2 * pause_s)

        def notice(hub: Any, process: Any) -> None:
            look_once(hub, process)
            if process in pool._pool:
                look(hub, process)

        pool._event_process_exit = notice
