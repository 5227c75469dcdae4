"""mili on Ray, in the extra `mili[ray]`: an application for Ray Serve and a recipe for Ray Data.

`build_app` and `build` make N replicas with the HTTP API of `mili serve`; `Generator` completes the rows of a dataset.
"""

try:
    import ray  # noqa: F401
except ImportError as error:
    raise ImportError("mili.ray needs Ray: pip install 'mili[ray]'") from error

from mili.ray.application import build, build_app
from mili.ray.data import Generator

__all__ = ["Generator", "build", "build_app"]
