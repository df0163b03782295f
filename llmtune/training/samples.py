"""Sample generations of a run's prompts, before and after training: greedy, from the very weights that train."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from llmtune.freed_memory import give_back_freed_memory
from llmtune.generation.engine import Engine
from llmtune.generation.sampling import Sampling
from llmtune.model import decode_completion
from llmtune.models.config import ModelConfig
from llmtune.models.language_model import LanguageModel
from llmtune.sharding import Strategy
from llmtune.tokenizers import Tokenizer


def sample(
    bind: Callable[[Any], LanguageModel],
    params: Any,
    rows: Sequence[list[int]],
    tokenizer: Tokenizer | None,
    end_ids: Sequence[int],
    config: ModelConfig,
    mesh: Mesh,
    strategy: Strategy,
    max_new_tokens: int,
) -> list[str]:
    """The completion of each prompt, given as ids; [] without prompts or without a tokenizer."""
    if not rows or tokenizer is None:
        return []
    completions = Engine(config, bind, mesh, strategy.whole_rows()).generate(
        params, rows, max_new_tokens=max_new_tokens, sampling=Sampling(), eos_ids=end_ids
    )
    give_back_freed_memory()  # of the layers' copy, where they are decoded with on a CPU
    return [decode_completion(tokenizer, *pair) for pair in zip(rows, completions, strict=True)]
