"""``GenerationDefaults``: the sampling settings a checkpoint recommends in ``generation_config.json``.

Knows names and ranges; knows neither ``SamplingParams`` nor how tokens are drawn. Fields not recommended stay None.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from mili.config._fields import Fields, read_json_object


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the checkpoint recommends, under the names ``SamplingParams`` uses. None: no recommendation."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    @classmethod
    def from_pretrained(cls, path: Path | str) -> "GenerationDefaults":
        """Read ``generation_config.json`` in the folder ``path``; no file means no recommendation.

        An explicit ``do_sample: false`` is greedy decoding, hence temperature 0. Raises ConfigError for a bad field.
        """
        file = Path(path) / "generation_config.json"
        if not file.exists():
            return cls()
        read = Fields(read_json_object(file), str(file))

        def number(name: str, *, minimum: float = 0.0, above: bool = False) -> float | None:
            return None if read.get(name) is None else read.number(name, minimum=minimum, above=above)

        def integer(name: str, *, minimum: int) -> int | None:
            return None if read.get(name) is None else read.integer(name, minimum=minimum)

        defaults = cls(
            temperature=number("temperature") if read.boolean("do_sample", True) else 0.0,
            top_k=integer("top_k", minimum=-1),
            top_p=number("top_p", above=True),
            min_p=number("min_p"),
            repetition_penalty=number("repetition_penalty", above=True),
            max_tokens=integer("max_new_tokens", minimum=1),
        )
        for name in ("top_p", "min_p"):
            if (getattr(defaults, name) or 0.0) > 1.0:
                raise read.wrong(name, "at most 1")
        return defaults

    def as_dict(self) -> dict[str, float | int]:
        """Only what is recommended, ready to be passed to ``SamplingParams`` as keywords."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
