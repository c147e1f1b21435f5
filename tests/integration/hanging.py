"""An agent whose worker can be made to hang; run as a module, it is that worker."""

import sys
import time
from typing import Any

from celery.worker.control import Panel

from sutazai import keeper
from sutazai.__main__ import main
from sutazai.agent import Agent

agent = Agent("hanging", port=8192, doc=__doc__, slots=(1, 1, 1))


@Panel.register(name="hang", type="control", help="Keep the worker's main thread for ever.")
def hang(state: Any, **_: Any) -> None:
    while True:
        time.sleep(1)


if __name__ == "__main__":
    # The test need not take the minutes that a deployed worker is given.
    keeper.STUCK_S, keeper.STUCK_CHECK_S, keeper.CANCEL_GRACE_S = 2.0, 0.5, 2.0
    sys.argv[1:] = ["worker", agent.name]
    main()
