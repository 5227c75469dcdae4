"""What the user and the checkpoint ask for, as frozen validated objects; nothing here loads or computes.

``ModelConfig`` and ``RopeConfig`` come from ``config.json``, ``GenerationDefaults`` from ``generation_config.json``,
``EngineConfig`` from the caller.
"""

from mili.config.engine import EngineConfig
from mili.config.generation import GenerationDefaults
from mili.config.model import ModelConfig
from mili.config.rope import RopeConfig

__all__ = ["EngineConfig", "GenerationDefaults", "ModelConfig", "RopeConfig"]
