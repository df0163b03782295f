"""Kernels: arrays in, arrays out. They know nothing of modules, weights or operators."""

from llmtune.kernels.attention import attention
from llmtune.kernels.attention_dropout import AttentionDropout, draw_attention_dropout
from llmtune.kernels.cached_attention import cached_attention
from llmtune.kernels.grouped_matmul import grouped_matmul
from llmtune.kernels.masks import Mask, visible
from llmtune.kernels.row_exchange import exchange_rows

__all__ = [
    "AttentionDropout",
    "Mask",
    "attention",
    "cached_attention",
    "draw_attention_dropout",
    "exchange_rows",
    "grouped_matmul",
    "visible",
]
