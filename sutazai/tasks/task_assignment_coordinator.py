"""Takes tasks that name a capability rather than an agent, and finds the agent for them.

So far it only describes itself; its other actions are not built yet.
"""

from __future__ import annotations

from sutazai.agent import Agent

agent = Agent("task-assignment-coordinator", port=8551, doc=__doc__, slots=(1, 1, 4))
