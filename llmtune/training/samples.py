"""Sample generations of a run's prompts, before and after training: greedy, from the very weights that train."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from llmtune.generation.engine import Engine
from llmtune.generation.sampling import Sampling
from llmtune.model import decode_completion, encode_prompt
from llmtune.models.config import ModelConfig
from llmtune.models.language_model import LanguageModel
from llmtune.sharding import Strategy
from llmtune.tokenizers import Tokenizer


def sample(
    bind: Callable[[Any], LanguageModel],
    params: Any,
    prompts: Sequence[str],
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    mesh: Mesh,
    strategy: Strategy,
    max_new_tokens: int,
) -> list[str]:
    """The completion of each prompt; [] without prompts or without a tokenizer."""
    if not prompts or tokenizer is None:
        return []
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    completions = Engine(config, bind, mesh, strategy).generate(
        params, rows, max_new_tokens=max_new_tokens, sampling=Sampling(), eos_ids=tokenizer.eos_ids
    )
    return [decode_completion(tokenizer, *pair) for pair in zip(rows, completions, strict=True)]
