"""The dense model as an author: text for calibration, written by transformers' own sampling."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recon.basics.seeds import isolated_seed
from recon.data.checks import require_embeddings, require_positions
from recon.data.token_source import Sampling
from recon.models.calls import embedding_weight, evaluating
from recon.models.loading import ModelSource
from recon.models.replay import Replay


@dataclass(frozen=True)
class DenseAuthor:
    """Writes with a dense model, wherever its blocks are; see `recon.data.token_source.Author`.

    With offloaded blocks each new token brings every block to the device once for all texts of a batch, so batches
    should be large. Keys and values of all tokens of a batch are on the device.

    Args:
        source: Names the model.
        tokenizer: Has the token that ends a text.
        versions: Versions of libraries, on which the numbers depend.
        opened: Gives the model, with its replay where that knows of offloaded blocks, when a text is to be written.
    """

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    versions: dict[str, str]
    opened: Callable[[], PreTrainedModel | Replay]

    def identity(self) -> Any:
        """See `Author`."""
        return {"model": self.source.identity(), "end": self.tokenizer.eos_token_id, "versions": self.versions}

    @torch.no_grad()
    def write(self, prompts: Tensor, num_tokens: int, sampling: Sampling, seed: int) -> tuple[Tensor, Tensor]:
        """See `Author`.

        Raises:
            ValueError: If the model has no embeddings or no positions for such texts, or cannot generate.
        """
        opened = self.opened()
        model: Any = opened.model if isinstance(opened, Replay) else opened
        if not hasattr(model, "generate"):
            raise ValueError(
                f"text of the dense model needs a model that generates, got {type(model).__name__} without "
                f"transformers' GenerationMixin; choose another data.source"
            )
        require_positions(num_tokens, model)
        require_embeddings(prompts, model, "the begin of generated texts")
        num_given, given = prompts.shape[1], prompts.to(embedding_weight(model).device)
        runnable = opened.whole_model() if isinstance(opened, Replay) else evaluating(model)
        with runnable, _blank_options(model), isolated_seed(seed):
            options = self._options(num_tokens - num_given, sampling)
            found = model.generate(given, attention_mask=torch.ones_like(given), generation_config=options)
        if isinstance(opened, Replay):
            opened.hold(())
        found = found.to("cpu", torch.int32)  # shorter if the model has ended all texts
        ids = torch.zeros(len(prompts), num_tokens, dtype=torch.int32)
        ids[:, : found.shape[1]] = found
        return ids, num_given + self._lengths(found[:, num_given:])

    def _options(self, num_new: int, sampling: Sampling) -> GenerationConfig:
        end: Any = self.tokenizer.eos_token_id
        return GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k or 0,
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            max_new_tokens=num_new,
            eos_token_id=end,
            pad_token_id=0 if end is None else end,
            use_cache=True,
        )

    def _lengths(self, written: Tensor) -> Tensor:
        """Tokens that the model has written of each text, up to its first end token."""
        end: Any = self.tokenizer.eos_token_id
        if end is None:
            return torch.full((len(written),), written.shape[1], dtype=torch.int32)
        is_end = written == end
        return torch.where(is_end.any(1), is_end.int().argmax(1) + 1, written.shape[1]).to(torch.int32)


@contextmanager
def _blank_options(model: Any) -> Iterator[None]:
    """Keep `generate` from filling options that are not given with those that came with the model."""
    given, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = given
