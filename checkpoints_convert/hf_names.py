"""Our parameter tree <-> Hugging Face tensor names: one declarative table, from which reading and writing both follow.

layers/0/attention/q/kernel  [L, in, out]   <->   model.layers.{0..L-1}.self_attn.q_proj.weight  [out, in]
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


BLOCK = {  # our path below a segment -> (Hugging Face name below a layer)
    "attention_norm/weight": "input_layernorm.weight",
    "attention/q/kernel": "self_attn.q_proj.weight",
    "attention/k/kernel": "self_attn.k_proj.weight",
    "attention/v/kernel": "self_attn.v_proj.weight",
    "attention/o/kernel": "self_attn.o_proj.weight",
    "mlp_norm/weight": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}
SEGMENT = "layers/0"


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint, in the order in which it is written. A tied head has none."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {  # as Hugging Face stores them, [out, in]
        "attention_norm/weight": (hidden,),
        "attention/q/kernel": (heads, hidden),
        "attention/k/kernel": (kv_heads, hidden),
        "attention/v/kernel": (kv_heads, hidden),
        "attention/o/kernel": (hidden, heads),
        "mlp_norm/weight": (hidden,),
        "mlp/gate/kernel": (inner, hidden),
        "mlp/up/kernel": (inner, hidden),
        "mlp/down/kernel": (hidden, inner),
    }
    table = [Tensor("model.embed_tokens.weight", (vocab, hidden), "embed/table", None, False)]
    for layer in range(config.num_hidden_layers):
        table += [
            Tensor(f"model.layers.{layer}.{theirs}", shapes[ours], f"{SEGMENT}/{ours}", layer, ours.endswith("kernel"))
            for ours, theirs in BLOCK.items()
        ]
    table.append(Tensor("model.norm.weight", (hidden,), "norm/weight", None, False))
    if not config.tie_word_embeddings:
        table.append(Tensor("lm_head.weight", (vocab, hidden), "head/kernel", None, True))
    return table


MODULES = {  # our path below a segment -> the module name that PEFT uses
    ours: theirs.removesuffix(".weight") for ours, theirs in BLOCK.items() if ours.endswith("kernel")
}
