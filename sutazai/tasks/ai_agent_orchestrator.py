"""Routes work to agents and runs plans of several steps.

So far it only describes itself; its other actions are not built yet.
"""

from __future__ import annotations

from sutazai.agent import Agent

agent = Agent("ai-agent-orchestrator", port=8589, doc=__doc__, slots=(1, 1, 4))
