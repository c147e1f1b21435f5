"""Serves language models through Ollama, with queueing and limits.

So far it only describes itself and watches its model server; its other actions are not built yet.
"""

from __future__ import annotations

import httpx

from sutazai.agent import Agent
from sutazai.settings import is_given, settings

agent = Agent("ollama-integration-specialist", port=11015, doc=__doc__, slots=(1, 1, 4))


@agent.health_check("ollama")
def model_server() -> str:
    """Say whether the model server answers; one that nobody configured may be absent."""
    url = settings().ollama_url
    try:
        httpx.get(f"{url}/api/version", timeout=1.5).raise_for_status()
    except httpx.HTTPError:
        return f"{url} does not answer" if is_given("ollama_url") else "absent"
    return "ok"
