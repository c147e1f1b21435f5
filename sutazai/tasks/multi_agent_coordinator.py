"""Carries messages between agents, and watches over their health.

So far it only describes itself; its other actions are not built yet.
"""

from __future__ import annotations

from sutazai.agent import Agent

agent = Agent("multi-agent-coordinator", port=8587, doc=__doc__, slots=(1, 1, 4))
