"""What a model is, before any weight is read: `llmtune inspect MODEL`.

    source = pretrained.open_source("mixtral-8x7b")      a preset, or a directory of which config.json and headers are read
    report(source, length=4096)                          lines for a person

Everything follows from the declared parameters and the config; the counts of a preset are those that were published.
"""

import math
from collections.abc import Mapping

from llmtune import pretrained
from llmtune.errors import LlmtuneConfigError
from llmtune.models.config import LinearScaling, Llama3Scaling, ModelConfig, Rope, YarnScaling
from llmtune.models.decoder import declare
from llmtune.transforms import weights_by_path

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
BYTES = {"TB": 1e12, "GB": 1e9, "MB": 1e6}
FLOPS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}
ADAMW_BYTES = 16  # per trained parameter: float32 weight, gradient and two moments
Counts = Mapping[str, int]  # path -> parameters


def count_parameters(config: ModelConfig) -> Counts:
    """Parameters of every declared weight; a tied head is part of the embedding."""
    return {path: math.prod(spec.shape) for path, spec in weights_by_path(declare(config)[1]).items()}


def active_parameters(config: ModelConfig, counts: Counts) -> int:
    """Those that one token's computation reads: of experts, the chosen ones."""
    return sum(int(size * _share(config, path)) for path, size in counts.items())


def matmul_flops(config: ModelConfig, counts: Counts) -> int:
    """Per token, forward: 2 for each weight of a matrix it goes through; looking up its embedding costs none."""
    paths = [path for path in counts if path.endswith("kernel")] + ["embed/table"] * config.tie_word_embeddings
    return sum(int(2 * counts[path] * _share(config, path)) for path in paths)


def attention_flops(config: ModelConfig, length: int) -> int:
    """Per token, forward: scores and their sums over values, averaged over a causal row of this length, windows honoured."""
    width = config.num_attention_heads * config.head_dim
    return round(sum(4 * width * _mean_seen(length, config.window(n)) for n in range(config.num_hidden_layers)))


def cache_bytes(config: ModelConfig, length: int, itemsize: int) -> int:
    """Of the key-value cache of one row of this length; layers with a window hold no more than that."""
    each = 2 * config.num_key_value_heads * config.head_dim * itemsize
    return sum(each * min(length, config.window(n) or length) for n in range(config.num_hidden_layers))


def report(source: pretrained.Source, length: int) -> list[str]:
    """The lines that `llmtune inspect` prints."""
    config = source.config
    counts = count_parameters(config)
    total, active = sum(counts.values()), active_parameters(config, counts)
    matmuls, attention = matmul_flops(config, counts), attention_flops(config, length)
    some = "" if active == total else f", {active:,} of them for each token"
    rows = {
        "model": f"{source.name}: {config.architecture}",
        "shape": f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, MLP {config.intermediate_size}, "
        f"{config.num_attention_heads} heads ({config.num_key_value_heads} key-value) of {config.head_dim}, "
        f"vocabulary {config.vocab_size:,}",
        "parameters": f"{total:,}{some}",
        "weights": ", ".join(f"{name} {_size(total * size)}" for name, size in DTYPES.items()) + _on_disk(source),
        "full fine-tuning": f"{_size(total * ADAMW_BYTES)} of float32 weights, gradients and AdamW moments, without activations",
        "FLOPs per token": f"forward {_flops(matmuls + attention)} ({_flops(matmuls)} in matmuls, {_flops(attention)} in "
        f"attention over rows of {length:,}), training {_flops(3 * (matmuls + attention))}",
        "KV cache": f"{cache_bytes(config, 1, 2):,} bytes per token in bfloat16, {cache_bytes(config, 1, 4):,} in float32; "
        f"{_size(cache_bytes(config, length, 2))} for {length:,} tokens in bfloat16",
        **implications(config),
    }
    width = max(map(len, rows))
    return [f"{name:<{width}}  {text}" for name, text in rows.items()]


def implications(config: ModelConfig) -> dict[str, str]:
    """What the config makes of attention, positions, experts, the head and biases."""
    biased = [name for name, there in (("attention", config.attention_bias), ("MLP", config.mlp_bias)) if there]
    rows = {
        "attention": _windows(config),
        "positions": f"{config.max_position_embeddings:,}; {_rope(config.rope)}",
        "head": "tied to the embedding" if config.tie_word_embeddings else "its own matrix",
    }
    if config.experts is not None:
        own = config.experts
        z_loss = f", router z-loss {own.router_z_loss_coef:g}" if own.router_z_loss_coef else ""
        rows["experts"] = (
            f"{own.num_experts_per_tok} of {own.num_local_experts} for each token; training adds "
            f"{own.router_aux_loss_coef:g} times the load-balancing loss{z_loss}"
        )
    if config.is_text_tower:
        rows["other towers"] = "not loaded; their tensors are carried through untouched when the model is saved"
    return {**rows, "biases": " and ".join(biased) or "none"}


def _windows(config: ModelConfig) -> str:
    if set(config.windows) == {None}:
        return "causal over the whole row"
    if len(config.windows) == 1:
        return f"causal, each layer over the last {config.windows[0]:,} tokens"
    kinds = ", ".join("all" if window is None else f"{window:,}" for window in config.windows)
    return f"causal, layers in a pattern of {len(config.windows)}: over {kinds} tokens"


def _rope(rope: Rope) -> str:
    base, scaling = f"RoPE with base {rope.theta:,.0f}", rope.scaling
    match scaling:
        case None:
            return f"{base}, unscaled"
        case LinearScaling():
            return f"{base}, linear scaling by {scaling.factor:g}"
        case Llama3Scaling() | YarnScaling():
            kind = "llama3" if isinstance(scaling, Llama3Scaling) else "YaRN"
            text = f"{base}, {kind} scaling by {scaling.factor:g} beyond {scaling.original_max_position_embeddings:,}"
    own = rope.query_scaling
    return text if own is None else f"{text}; queries scaled by position with beta {own.beta:g}"


def _on_disk(source: pretrained.Source) -> str:
    stored = source.stored_bytes()
    return f"; on disk {', '.join(f'{name} {_size(size)}' for name, size in stored.items())}" if stored else ""


def _share(config: ModelConfig, path: str) -> float:
    if config.experts is None or "/experts/" not in path:
        return 1.0
    return config.experts.num_experts_per_tok / config.experts.num_local_experts


def _mean_seen(length: int, window: int | None) -> float:
    """Tokens that a token of a causal row sees, on average."""
    reach = min(length, window or length)
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def _size(count: float) -> str:
    unit = next((unit for unit, scale in BYTES.items() if count >= scale), "MB")
    return f"{count / BYTES[unit]:,.1f} {unit}"


def _flops(count: float) -> str:
    unit = next((unit for unit, scale in FLOPS.items() if count >= scale), "MFLOP")
    return f"{count / FLOPS[unit]:,.2f} {unit}"


def inspect(name: str, length: int | None = None) -> list[str]:
    """`report` of a directory or a preset. Rows of 4096 tokens unless told, or of as many as the model has positions."""
    if length is not None and length < 1:
        raise LlmtuneConfigError(f"length: {length} must be at least 1")
    source = pretrained.open_source(name)
    return report(source, length or min(4096, source.config.max_position_embeddings))
