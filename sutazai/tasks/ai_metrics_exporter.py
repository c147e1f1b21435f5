"""Shows the metrics of every agent, queue and host on one page.

So far it only describes itself; its other actions are not built yet.
"""

from __future__ import annotations

from sutazai.agent import Agent

agent = Agent("ai-metrics-exporter", port=11063, doc=__doc__, slots=(1, 1, 4))
