"""Our parameter tree <-> Hugging Face tensor names: one declarative table, from which reading and writing both follow.

layers/0/attention/q/kernel  [L, in, out]      <->   model.layers.{0..L-1}.self_attn.q_proj.weight  [out, in]
layers/0/mlp/experts/gate/kernel  [L, E, in, out]  <->   model.layers.{0..L-1}.block_sparse_moe.experts.{0..E-1}.w1.weight

Names are those of the modules in transformers, which PEFT uses too; older spellings of them are in `hf_multimodal`.
"""

from dataclasses import dataclass

from llmtune.models.config import ModelConfig


@dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor: its shape there, the path of our weight, its place in the stack, whether it is transposed."""

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    transposed: bool
    expert: int | None = None

    @property
    def index(self) -> tuple[int, ...]:
        """Its place in our stacked weight: (), (layer,) or (layer, expert)."""
        return tuple(place for place in (self.layer, self.expert) if place is not None)


ATTENTION = {  # our path below a segment -> Hugging Face's name below a layer
    "attention_norm/weight": "input_layernorm.weight",
    "attention/q/kernel": "self_attn.q_proj.weight",
    "attention/q/bias": "self_attn.q_proj.bias",
    "attention/k/kernel": "self_attn.k_proj.weight",
    "attention/k/bias": "self_attn.k_proj.bias",
    "attention/v/kernel": "self_attn.v_proj.weight",
    "attention/v/bias": "self_attn.v_proj.bias",
    "attention/o/kernel": "self_attn.o_proj.weight",
    "attention/o/bias": "self_attn.o_proj.bias",
    "mlp_norm/weight": "post_attention_layernorm.weight",
}
MLP = {
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/gate/bias": "mlp.gate_proj.bias",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/up/bias": "mlp.up_proj.bias",
    "mlp/down/kernel": "mlp.down_proj.weight",
    "mlp/down/bias": "mlp.down_proj.bias",
}
ROUTER = {"mlp/router/kernel": "block_sparse_moe.gate.weight"}
EXPERT = {  # below block_sparse_moe.experts.N
    "mlp/experts/gate/kernel": "w1.weight",
    "mlp/experts/up/kernel": "w3.weight",
    "mlp/experts/down/kernel": "w2.weight",
}
SEGMENT = "layers/0"


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint, in the order in which it is written. A tied head has none."""
    hidden, vocab, root = config.hidden_size, config.vocab_size, root_module(config)
    table = [Tensor(f"{root}.embed_tokens.weight", (vocab, hidden), "embed/table", None, False)]
    for layer in range(config.num_hidden_layers):
        table += _layer(config, f"{root}.layers.{layer}", layer)
    table.append(Tensor(f"{root}.norm.weight", (hidden,), "norm/weight", None, False))
    if not config.tie_word_embeddings:
        table.append(Tensor("lm_head.weight", (vocab, hidden), "head/kernel", None, True))
    return table


def root_module(config: ModelConfig) -> str:
    """The module of the decoder: that of a multimodal model lies a level deeper."""
    return "model.language_model" if config.is_text_tower else "model"


def _layer(config: ModelConfig, module: str, layer: int) -> list[Tensor]:
    shapes, dense = _shapes(config), config.experts is None
    names = {**ATTENTION, **(MLP if dense else ROUTER)}
    table = [
        Tensor(f"{module}.{theirs}", shapes[ours], f"{SEGMENT}/{ours}", layer, ours.endswith("kernel"))
        for ours, theirs in names.items()
        if ours in shapes
    ]
    for expert in range(0 if config.experts is None else config.experts.num_local_experts):
        below = f"{module}.block_sparse_moe.experts.{expert}"
        table += [
            Tensor(f"{below}.{theirs}", shapes[ours], f"{SEGMENT}/{ours}", layer, True, expert)
            for ours, theirs in EXPERT.items()
        ]
    return table


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of what this architecture has, as Hugging Face stores it: matrices [out, in]."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    matrices = {
        "attention/q": (heads, hidden),
        "attention/k": (kv_heads, hidden),
        "attention/v": (kv_heads, hidden),
        "attention/o": (hidden, heads),
        "mlp/gate": (inner, hidden),
        "mlp/up": (inner, hidden),
        "mlp/down": (hidden, inner),
    }
    biased = {"attention": config.attention_bias, "mlp": config.mlp_bias}
    shapes: dict[str, tuple[int, ...]] = {f"{name}/kernel": shape for name, shape in matrices.items()}
    shapes |= {f"{name}/bias": shape[:1] for name, shape in matrices.items() if biased[name.split("/")[0]]}
    if config.experts is not None:
        shapes["mlp/router/kernel"] = (config.experts.num_local_experts, hidden)
        shapes |= {ours: shapes[ours.replace("experts/", "")] for ours in EXPERT}
    return {**shapes, "attention_norm/weight": (hidden,), "mlp_norm/weight": (hidden,)}


MODULES = {  # our path below a segment -> the module name that PEFT uses
    ours: theirs.removesuffix(".weight") for ours, theirs in {**ATTENTION, **MLP}.items() if ours.endswith("kernel")
}
