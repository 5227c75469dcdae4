"""The Ray Serve application: N replicas of a model behind one ingress, with prefix-aware routing.

Only puts deployments together; processes, placement, restarts and scaling are Ray's. Invariant: options are checked
here, before anything is deployed, and each of them reaches the replicas or Ray.
"""

from dataclasses import MISSING, fields
from typing import Any

from pydantic import ConfigDict, Field, create_model
from ray import serve
from ray.serve.config import RequestRouterConfig

from mili.config import EngineConfig
from mili.errors import ConfigError
from mili.ray.ingress import Ingress
from mili.ray.prefix import PREFIX_CAPACITY
from mili.ray.replica import Replica
from mili.server.config import ServerConfig

# What concerns the HTTP server and the process, which here are Serve's: see HTTPOptions and LoggingConfig of ray.serve.
_OF_SERVE = {"host", "port", "write_timeout", "keep_alive", "log_format", "access_log"}
_SERVER = {field.name: field for field in fields(ServerConfig) if field.name not in _OF_SERVE}
_ENGINE = {"block_size" if field.name == "page_size" else field.name: field for field in fields(EngineConfig)}
_PROBES = 64  # requests a replica takes beyond what its engine does: health, models, and those it refuses with 429


_FIELDS: Any = {
    name: (field.type, ... if field.default is MISSING else field.default)
    for name, field in (_ENGINE | _SERVER).items()
}
_Options: Any = create_model("_Options", **_FIELDS)


class Arguments(_Options):
    """What `serve run mili.ray:build name=value …` takes: placement, and the options of `LLM` and `ServerConfig`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None  # a folder that every node has, or a Hugging Face name; None: the bundled model
    revision: str | None = None
    hf_overrides: dict[str, Any] | None = None
    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, ge=0)  # of a replica; fractions share a core
    num_gpus: float = Field(0.0, ge=0)  # of a replica; with fractions, divide gpu_memory_utilization too
    max_imbalance: int = Field(8, ge=0)  # requests a replica may have more than the least busy and still be preferred
    health_check_period: float = Field(5.0, gt=0)  # Serve replaces a replica after three failures


def build_app(model: str | None = None, **options: Any) -> serve.Application:
    """The application for `serve.run`.

    Args:
        model: As for `LLM`; a folder must be there on every node.
        options: `num_replicas`, `num_cpus` and `num_gpus` of a replica, `max_imbalance`, `health_check_period`, the
            options of `LLM`, and those of `ServerConfig` but address, connections and logs, which are Serve's.

    Raises:
        pydantic.ValidationError: An option is unknown or has a value of the wrong kind.
        ConfigError: A value is out of range.
    """
    return build(Arguments(model=model, **options))


def build(arguments: Arguments) -> serve.Application:
    """The same for `serve run mili.ray:build num_replicas=2 …` and for `args` in a Serve config file."""
    server = ServerConfig(access_log=False, **{name: getattr(arguments, name) for name in _SERVER})
    engine = {name: getattr(arguments, name) for name in _ENGINE}
    EngineConfig(**{field.name: engine[name] for name, field in _ENGINE.items()})  # raises here, not on a replica
    if arguments.num_gpus == 0 and arguments.device.startswith(("gpu", "cuda")):
        raise ConfigError(
            f"device is {arguments.device!r} but num_gpus is 0: give each replica a GPU or a share of one"
        )
    capacity = arguments.max_num_seqs + server.max_queue + _PROBES
    replicas = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=arguments.num_replicas,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        max_ongoing_requests=capacity,
        health_check_period_s=arguments.health_check_period,
        graceful_shutdown_timeout_s=server.drain_timeout,
        request_router_config=RequestRouterConfig(
            request_router_class="mili.ray.router.PrefixRouter",
            request_router_kwargs={"max_imbalance": arguments.max_imbalance, "capacity": PREFIX_CAPACITY},
        ),
    ).bind(arguments.model, server, engine | {"revision": arguments.revision, "hf_overrides": arguments.hf_overrides})
    ingress = serve.deployment(
        Ingress,
        name="Ingress",
        max_ongoing_requests=capacity * arguments.num_replicas,
        graceful_shutdown_timeout_s=server.drain_timeout,
    )
    return ingress.bind(replicas, server)
