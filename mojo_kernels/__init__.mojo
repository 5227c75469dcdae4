"""Kernels of mili: every op that a Qwen3 forward pass and its sampler need, each with a CPU and a GPU path."""

from .embedding import *
from .linear import *
from .norm_linear import *
from .paged_attention import *
from .qk_norm_rope_store import *
from .rms_norm import *
from .rope_attention import *
from .sampling import *
from .silu_mul import *
from .take_rows import *
