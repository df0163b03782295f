"""What the mathematics of a model needs, and nothing of meshes, kernels or training.

One frozen dataclass spans the Llama 3 and Mistral families. Field names are those of Hugging Face's config.json, which is
the only truth about a model: `checkpoints_convert/hf_config.py` reads it strictly and refuses what is not implemented.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`); see `llmtune.models.rope`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base frequency and how frequencies are scaled (None: `rope_type: default`)."""

    theta: float = 10_000.0
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder. Sizes are numbers of elements; `head_dim` need not be hidden_size / num_attention_heads."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope: Rope = Rope()
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
