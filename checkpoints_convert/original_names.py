"""Meta's and Mistral's own tensor names, which are one and the same, and how their tensors differ from Hugging Face's.

model.layers.3.self_attn.q_proj.weight  <->  layers.3.attention.wq.weight, rows of a head in pairs instead of halves
model.layers.3.mlp.down_proj.weight     <->  layers.3.feed_forward.w2.weight, split by columns over tensor-parallel files
"""

import re

TOP = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "block_sparse_moe.gate": "feed_forward.gate",
}
EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
FREQUENCIES = "rope.freqs"  # a buffer of rotary frequencies that older files carry
SPLIT_AXES = {  # over which axes tensor-parallel files may split a tensor, by the last part of its name; others are repeated
    "tok_embeddings": (0, 1),  # rows since Llama 3, columns before
    "output": (0,), "wq": (0,), "wk": (0,), "wv": (0,), "wo": (1,), "w1": (0,), "w2": (1,), "w3": (0,),
}  # fmt: skip


def original_name(name: str) -> str | None:
    """A Hugging Face tensor's name in Meta's and Mistral's layouts; None where they have no such tensor."""
    if name in TOP:
        return TOP[name]
    found = LAYER.fullmatch(name)
    if found is None:
        return None
    layer, inner = found.groups()
    expert = EXPERT.fullmatch(inner)
    theirs = f"feed_forward.experts.{expert[1]}.{expert[2]}" if expert else BLOCK.get(inner)
    return theirs and f"layers.{layer}.{theirs}.weight"


def is_rotated(name: str) -> bool:
    """Whether the rows of this Hugging Face tensor are turned by the rotary embedding, so that their order differs."""
    return name.endswith((".self_attn.q_proj.weight", ".self_attn.k_proj.weight"))


def split_axes(original: str) -> tuple[int, ...]:
    """Along which axes tensor-parallel files may split this tensor; () where each file repeats it."""
    return SPLIT_AXES.get(original.removesuffix(".weight").rsplit(".", 1)[-1], ())
