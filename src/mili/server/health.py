"""Probes and facts: alive, ready, which version, with what settings.

`/health` is for restarting: it fails only when the engine is dead. `/ready` is for routing: it fails while the server
could not answer a request now. Invariant: neither does any work, so a probe is answered however busy the engine is; and
nothing here shows a key or a path.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version as installed_version
from platform import python_version
from typing import Any

from fastapi import APIRouter

import mili
from mili.async_llm import AsyncLLM
from mili.config import ModelConfig
from mili.errors import EngineDeadError
from mili.sampling_params import SamplingParams
from mili.server.config import ServerConfig
from mili.server.drain import Drain
from mili.server.errors import ApiError
from mili.server.service import Service


@dataclass(slots=True)
class Readiness:
    """Why no request should be sent here, if there is a reason."""

    llm: AsyncLLM
    drain: Drain
    stall_timeout: float
    token_made: bool = field(default=False, init=False)

    async def make_token(self) -> None:
        """Generate one token, the proof that requests can be served."""
        await self.llm.complete("Hello", SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        self.token_made = True

    def check_alive(self) -> None:
        """Raise the 503 if the engine has died."""
        try:
            self.llm.check_health()
        except EngineDeadError as error:
            cause = "it was closed" if error.__cause__ is None else type(error.__cause__).__name__
            raise _unavailable(f"the engine is dead: {cause}", "engine_dead") from error

    def check_ready(self) -> None:
        """Raise the 503 if a request could not be served now."""
        self.check_alive()
        if self.drain.started:
            raise _unavailable("the server is shutting down", "draining")
        if not self.token_made:
            raise _unavailable("no token has been made yet", "starting")
        if (seconds := self.llm.seconds_since_progress) > self.stall_timeout:
            raise _unavailable(f"no step has finished for {seconds:.0f} s", "stalled")

    @property
    def ready(self) -> bool:
        """Whether `check_ready` raises nothing."""
        try:
            self.check_ready()
        except ApiError:
            return False
        return True


def _unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, type="service_unavailable", code=code)


def make_router(service: Service, readiness: Readiness) -> APIRouter:
    """The routes; those with another system's name are there for its probes."""
    router = APIRouter(tags=["operation"])

    @router.get("/health")
    @router.get("/v2/health/live", include_in_schema=False)  # KServe
    @router.get("/ping", include_in_schema=False)  # SageMaker
    async def health() -> dict[str, str]:
        """200 while the engine lives; 503 says that the process should be restarted."""
        readiness.check_alive()
        return {"status": "alive"}

    @router.get("/ready")
    @router.get("/v2/health/ready", include_in_schema=False)  # KServe
    async def ready() -> dict[str, str]:
        """200 if a request would be served now; 503 with the reason otherwise."""
        readiness.check_ready()
        return {"status": "ready"}

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The version of mili."""
        return {"version": mili.__version__}

    @router.get("/server_info")
    async def server_info() -> dict[str, Any]:
        """The settings in effect, the memory plan and what the start took."""
        llm = service.llm
        return {
            "version": mili.__version__,
            "python": python_version(),
            "max": installed_version("max"),
            "model": service.model_name,
            "model_config": _shape(llm.model_config),
            "device": llm.device,
            "dtype": llm.dtype,
            "max_model_len": llm.max_model_len,
            "max_num_seqs": llm.max_num_seqs,
            "max_event_rate": llm.max_event_rate if math.isfinite(llm.max_event_rate) else None,  # JSON has no infinity
            "memory": {**asdict(llm.memory), "kv_bytes": llm.memory.kv_bytes},
            "startup_seconds": llm.startup_seconds,
            "server": _settings(service.config),
        }

    return router


def _settings(config: ServerConfig) -> dict[str, Any]:
    hidden = ("api_keys", "max_event_rate")  # secret; shown as it is in effect
    settings = {item.name: getattr(config, item.name) for item in fields(config) if item.name not in hidden}
    return {**settings, "num_api_keys": len(config.api_keys)}


def _shape(config: ModelConfig) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return {name: getattr(config, name) for name in names}
