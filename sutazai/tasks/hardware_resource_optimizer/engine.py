"""The model server, as far as its memory is concerned: which models it holds, unloading one.

Only a server on this machine counts: unloading elsewhere would free nothing here.
"""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
from pydantic import BaseModel

from sutazai.agent import Context
from sutazai.errors import InvalidInput, Unavailable
from sutazai.settings import settings
from sutazai.tasks.hardware_resource_optimizer.item import Gain, PlanItem

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_ANSWER_S = 2.0
_LOAD_S = 120.0
_UNLOAD_S = 10.0


class LoadedModel(BaseModel):
    """One entry of `/api/ps`."""

    name: str
    size: int = 0
    size_vram: int = 0

    @property
    def memory_bytes(self) -> int:
        """What it holds of the machine's own memory."""
        return max(0, self.size - self.size_vram)


class _Running(BaseModel):
    models: list[LoadedModel] = []


def loaded_models() -> list[LoadedModel]:
    """Return the models in memory; none without a server that answers on this machine."""
    if urlsplit(settings().ollama_url).hostname not in _LOOPBACK:
        return []
    try:
        answer = httpx.get(f"{settings().ollama_url}/api/ps", timeout=_ANSWER_S)
        answer.raise_for_status()
        return _Running.model_validate_json(answer.content).models
    except (httpx.HTTPError, ValueError):
        return []


class UnloadModel:
    """Takes a model out of memory; the next request for it loads it again, which takes seconds."""

    def propose(self) -> list[PlanItem]:
        """Offer it for every model in memory, the largest first."""
        models = sorted(loaded_models(), key=lambda model: -model.memory_bytes)
        return [
            PlanItem(
                id=f"unload_model-{number}",
                kind="unload_model",
                target=model.name,
                expected_gain={
                    "memory_bytes": model.memory_bytes,
                    "gpu_memory_bytes": model.size_vram,
                },
                risk="medium",
                reversible=True,
                evidence={"size_bytes": model.size, "gpu_bytes": model.size_vram},
            )
            for number, model in enumerate(models, start=1)
        ]

    def prepare(self, item: PlanItem, context: Context, audit_id: UUID) -> dict[str, Any]:  # noqa: ARG002
        """Check that it is still in memory."""
        if item.target not in {model.name for model in loaded_models()}:
            raise InvalidInput(f"{item.target} is not in memory any more.")
        return {"model": item.target}

    def carry_out(self, item: PlanItem, undo: dict[str, Any], context: Context) -> Gain:  # noqa: ARG002
        """Unload it and wait until the server says that it is gone."""
        before = {model.name: model for model in loaded_models()}.get(item.target)
        if before is None:
            return {"memory_bytes": 0}
        _generate({"model": item.target, "keep_alive": 0}, _UNLOAD_S)
        deadline = time.monotonic() + _UNLOAD_S
        while time.monotonic() < deadline:
            if item.target not in {model.name for model in loaded_models()}:
                return {"memory_bytes": before.memory_bytes, "gpu_memory_bytes": before.size_vram}
            time.sleep(0.1)
        return {"memory_bytes": 0}

    def undo(self, undo: dict[str, Any], context: Context) -> None:  # noqa: ARG002
        """Load it again."""
        _generate({"model": undo["model"]}, _LOAD_S)


def _generate(body: dict[str, Any], timeout_s: float) -> None:
    """Send a request without a prompt, which only loads or unloads."""
    try:
        answer = httpx.post(
            f"{settings().ollama_url}/api/generate",
            json={**body, "stream": False},
            timeout=timeout_s,
        )
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise Unavailable(f"The model server refused {body['model']}: {error}") from None
