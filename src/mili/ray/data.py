"""The Ray Data recipe: a class for `Dataset.map_batches` with one `LLM` for each actor.

Ray Data splits the rows, starts the actors and keeps the order; this turns a batch into a call of `LLM.generate`.
Invariant: a batch comes out with as many rows as went in, and with all its columns.
"""

from typing import Any

import numpy as np

from mili.llm import LLM
from mili.sampling_params import SamplingParams

Batch = dict[str, "np.ndarray[Any, Any]"]


class Generator:
    """Completes a column of prompts.

        dataset.map_batches(
            Generator, fn_constructor_kwargs={"model": "Qwen/Qwen3-8B"}, batch_size=256, concurrency=4, num_gpus=1
        )

    A larger `batch_size` keeps the engine fuller; from a few times `max_num_seqs` on it makes no difference.
    """

    def __init__(
        self,
        model: str | None = None,
        sampling_params: SamplingParams | None = None,
        prompt_column: str = "prompt",
        output_column: str = "generated_text",
        **options: Any,
    ) -> None:
        """Load `model`; `options` are those of `LLM`.

        Args:
            model: As for `LLM`; a folder must be there on every node.
            sampling_params: For all rows; None for the model's defaults.
            prompt_column: Has the prompts, as text or as token ids.
            output_column: Gets the first completion's text.
            options: As for `LLM`.
        """
        self._llm = LLM(model, **options)
        self._params = sampling_params
        self._prompts = prompt_column
        self._output = output_column

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the completions, their finish reasons and token counts.

        Raises:
            RequestError: A row cannot be served; Ray Data fails the dataset unless `max_errored_blocks` allows it.
        """
        outputs = self._llm.generate(list(batch[self._prompts]), self._params, use_tqdm=False)
        return batch | {
            self._output: np.array([output.text for output in outputs], dtype=object),
            "finish_reason": np.array([str(output.outputs[0].finish_reason) for output in outputs], dtype=object),
            "num_prompt_tokens": np.array([len(output.prompt_token_ids) for output in outputs]),
            "num_generated_tokens": np.array([len(output.outputs[0].token_ids) for output in outputs]),
        }
