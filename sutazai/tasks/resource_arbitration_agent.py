"""Grants shares of the machine's resources, so that agents do not starve each other.

So far it only describes itself; its other actions are not built yet.
"""

from __future__ import annotations

from sutazai.agent import Agent

agent = Agent("resource-arbitration-agent", port=8588, doc=__doc__, slots=(1, 1, 4))
