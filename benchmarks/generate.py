"""Greedy decoding, llmtune beside transformers, in turn, on the same random Llama and the same prompts.

    python -m benchmarks.generate                        25 M parameters, float32, batch 1, 8 and 64
    python -m benchmarks.generate --shape 1b --dtype bfloat16 --batches 1 16 --device gpu

Both sides generate the full number of tokens (no eos) with a key-value cache; a measurement is one whole call, prompt
included. The completions of both sides must be equal in float32.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import side_by_side
from benchmarks.shapes import SHAPES, parameter_count, write_model


def prompts(settings: dict[str, Any]) -> list[list[int]]:
    """`batch` prompts of `length` random tokens."""
    shape = (settings["batch"], settings["length"])
    return np.random.default_rng(0).integers(3, SHAPES[settings["shape"]]["vocab_size"], shape).tolist()


def digest(completions: list[list[int]]) -> str:
    """A short name of what was generated."""
    return hashlib.sha256(json.dumps(completions).encode()).hexdigest()[:8]


def prepare_llmtune(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    import llmtune

    model, rows = llmtune.load(settings["model"], dtype=settings["dtype"]), prompts(settings)
    start = time.perf_counter()
    first = model.generate(rows, max_new_tokens=settings["new_tokens"])
    seconds = time.perf_counter() - start

    def work() -> float:
        start = time.perf_counter()
        model.generate(rows, max_new_tokens=settings["new_tokens"])
        return time.perf_counter() - start

    return {"completions": digest(first), "first_call_seconds": seconds}, work


def prepare_peer(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if settings["device"] == "gpu" else "cpu"
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=dtype, attn_implementation="sdpa", device_map=device
    )
    model = model.eval()
    tokens = torch.tensor(prompts(settings), device=device)
    mask = torch.ones_like(tokens)

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=mask, max_new_tokens=settings["new_tokens"], do_sample=False,
                                 pad_token_id=0)  # fmt: skip
        return out[:, tokens.shape[1] :].tolist()

    first = generate()

    def work() -> float:
        start = time.perf_counter()
        generate()
        return time.perf_counter() - start

    return {"completions": digest(first)}, work


def arguments() -> argparse.ArgumentParser:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="25m")
    parser.add_argument("--keep", type=Path, help="a folder in which the model is left for the next call")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="prompts in one call")
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    return parser


def measure(own: argparse.Namespace) -> dict[str, Any]:
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model((own.keep or Path(scratch)) / own.shape, own.shape, own.dtype)
        for batch in own.batches:
            settings = {"model": str(model), "batch": batch, "shape": own.shape, "length": own.length,
                        "new_tokens": own.new_tokens, "dtype": own.dtype, "device": own.device}  # fmt: skip
            print(f"greedy decoding, batch {batch}, {own.length} + {own.new_tokens} tokens, Llama {own.shape} "
                  f"({parameter_count(own.shape):,} parameters), {own.dtype}, {own.device}", flush=True)  # fmt: skip
            units = batch * own.new_tokens
            found = side_by_side.compare("benchmarks.generate", settings, pairs=own.pairs, units=units, unit="tokens/s")
            if own.dtype == "float32" and found["llmtune"]["completions"] != found["peer"]["completions"]:
                raise SystemExit("the completions of both sides differ: the comparison is void")
            results[str(batch)] = found
    return results


if __name__ == "__main__":
    side_by_side.run(arguments(), prepare_llmtune, prepare_peer, measure)
