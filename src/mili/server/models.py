"""GET /v1/models and /v1/models/{id}: the one model that is served.

Invariant: what is listed is what `model` in a request may say.
"""

import time

from fastapi import APIRouter

from mili.server.protocol_responses import ModelCard, ModelList
from mili.server.routing import documented
from mili.server.service import Service


def make_router(service: Service) -> APIRouter:
    """The routes, bound to `service`."""
    router = APIRouter()
    card: ModelCard = {
        "id": service.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "mili",
        "max_model_len": service.llm.max_model_len,
    }

    @router.get("/v1/models", response_model=None, responses=documented(ModelList))
    async def list_models() -> ModelList:
        """The models being served."""
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{model_id:path}", response_model=None, responses=documented(ModelCard))
    async def get_model(model_id: str) -> ModelCard:
        """One of them; names may hold slashes."""
        service.check_model(model_id)
        return card

    return router
