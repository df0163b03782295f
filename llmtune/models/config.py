"""What the mathematics of a model needs, and nothing of meshes, kernels or training.

One frozen dataclass spans the Llama 3 and Mistral families. Field names are those of Hugging Face's config.json, which is
the only truth about a model: `checkpoints_convert/hf_config.py` reads it strictly and refuses what is not implemented.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by `factor` (`rope_type: linear`)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`); see `llmtune.models.rope`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (`rope_type: yarn`): low frequencies divided by `factor`, and cosines and sines multiplied.

    By `attention_factor`, or, where that is None, by what `factor`, `mscale` and `mscale_all_dim` give.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class QueryScaling:
    """Ministral 3's `llama_4_scaling_beta`: queries grow by 1 + beta * log(1 + floor(position / original))."""

    beta: float
    original_max_position_embeddings: int


Scaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base frequency and how frequencies are scaled (None: `rope_type: default`)."""

    theta: float = 10_000.0
    scaling: Scaling | None = None
    query_scaling: QueryScaling | None = None


@dataclass(frozen=True)
class Experts:
    """Mixture of experts: of `num_local_experts` MLPs, each token goes through `num_experts_per_tok`.

    The coefficients say how much of the load-balancing loss and of the router's z-loss training adds.
    """

    num_local_experts: int
    num_experts_per_tok: int
    router_aux_loss_coef: float
    router_z_loss_coef: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. Sizes are numbers of elements; `head_dim` need not be hidden_size / num_attention_heads.

    `attention_dropout`: of the weights of attention while the model trains, unless the run says otherwise.
    `windows`: the sliding window of each layer (None: it sees the whole row) as the shortest pattern that repeats.
    """

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
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    windows: tuple[int | None, ...] = (None,)
    experts: Experts | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def is_text_tower(self) -> bool:
        """Whether this is the text decoder of a multimodal model, whose other towers are not loaded."""
        return self.architecture.endswith("ForConditionalGeneration")

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer."""
        return self.windows[layer % len(self.windows)]
