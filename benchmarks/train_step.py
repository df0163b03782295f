"""One training step, llmtune beside transformers (+ peft), in turn, on the same random Llama and the same tokens.

    python -m benchmarks.train_step                      full and LoRA r=8 on all linear layers, 25 M parameters, float32
    python -m benchmarks.train_step --shape 1b --dtype bfloat16 --batch 4 --length 2048 --device gpu --documents one
    python -m benchmarks.train_step --shape 8b --methods lora qlora --dtype bfloat16 --batch 1 --length 2048 --remat block \
        --device gpu --documents one                                                       (needs bitsandbytes for qlora)

llmtune's side is the program that `llmtune train` runs (`llmtune.training.program`), rows and layouts included. The peer is
torch's fused AdamW on transformers with `sdpa` attention, peft for LoRA, and bitsandbytes for a base in NF4. Both start from the
same weights, and print the loss of their first step, which must agree.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import side_by_side
from benchmarks.shapes import SHAPES, active_parameters, parameter_count, write_model
from llmtune.huge_pages import restart_with_huge_pages

LEARNING_RATE, RANK, ALPHA = 1e-4, 8, 16
H200_BF16 = 989e12  # dense tensor-core FLOP/s of an H100 or H200 (NVIDIA data sheet)


def rows(settings: dict[str, Any]) -> np.ndarray:
    """int32 [batch, length] of random tokens."""
    shape = (settings["batch"], settings["length"])
    return np.random.default_rng(0).integers(3, SHAPES[settings["shape"]]["vocab_size"], shape).astype(np.int32)


def prepare_llmtune(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    import jax

    from llmtune import pretrained
    from llmtune.config.file import build_run
    from llmtune.models.decoder import declare
    from llmtune.training.program import build_program
    from llmtune.training.weights import choose_layout

    adapt = {"adapt": {"method": "lora", "rank": RANK, "alpha": ALPHA, "targets": settings["targets"]}}
    quantize = {"quantize": {"base": "nf4", "double": True}}
    tree = {
        "model": settings["model"], "output": "unused", "objective": "pretrain",
        "data": {"train": "unused", "packing": settings["documents"] == "packed"},
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup_steps": 0, "clip_norm": None},
        "train": {"batch_size": settings["batch"], "dtype": settings["dtype"], "remat": settings["remat"], "steps": 10**6},
        **(adapt if settings["method"] != "full" else {}),
        **(quantize if settings["method"] == "qlora" else {}),
    }  # fmt: skip
    run = build_run(tree, "benchmark")
    source = pretrained.open_source(run.model)
    mesh, strategy = choose_layout(None, declare(source.config)[1], jax.devices()[:1])
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(mesh))
    program, state = build_program(run, source, 10**6, mesh, strategy, lambda done: None)
    tokens = rows(settings)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "labels": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
    step, seconds = program.compile(state, program.place(batch))
    state, metrics = step(state, program.frozen, program.place(batch))
    held = {"state": state, "stack": stack}

    def work() -> float:
        start = time.perf_counter()
        for _ in range(settings["steps"]):
            held["state"], metrics = step(held["state"], program.frozen, program.place(batch))
        jax.device_get(metrics)
        return time.perf_counter() - start

    stats = jax.devices()[0].memory_stats() or {}
    memory = {"device_peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {}
    return {"first_loss": float(metrics["loss"]), "compile_seconds": seconds, **memory}, work


def prepare_peer(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if settings["device"] == "gpu" else "cpu"
    dtype = getattr(torch, settings["dtype"])
    autocast = settings["dtype"] != "float32" and settings["method"] == "full"
    weights = torch.float32 if autocast else dtype  # float32 masters under autocast, as llmtune keeps them
    base = {"quantization_config": nf4(dtype)} if settings["method"] == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=weights, attn_implementation="sdpa", device_map=device, **base
    )
    if settings["method"] != "full":
        from peft import LoraConfig, get_peft_model

        targets = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}.get(settings["targets"], settings["targets"])
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    if settings["remat"] != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if settings["method"] != "full":
            model.enable_input_require_grads()
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    tokens = torch.tensor(rows(settings), dtype=torch.long, device=device)

    def step() -> float:
        with torch.autocast(device, dtype) if autocast else contextlib.nullcontext():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def work() -> float:
        start = time.perf_counter()
        for _ in range(settings["steps"]):
            loss = step()
        loss.item()
        return time.perf_counter() - start

    first = step().item()
    memory = {"device_peak_gb": torch.cuda.max_memory_allocated() / 1e9} if device == "cuda" else {}
    return {"first_loss": first, **memory}, work


def nf4(dtype: Any) -> Any:
    """The base as QLoRA keeps it: 4 bits, the blocks' magnitudes in 8."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def flops_per_step(settings: dict[str, Any]) -> float:
    """6 per parameter and token (4 where the base is frozen), and causal attention's products."""
    s = SHAPES[settings["shape"]]
    tokens, factor = settings["batch"] * settings["length"], 6 if settings["method"] == "full" else 4
    attention = s["num_hidden_layers"] * 2 * settings["length"] * s["num_attention_heads"] * s["head_dim"]
    return tokens * (factor * active_parameters(settings["shape"]) + 3 * attention)


def arguments() -> argparse.ArgumentParser:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="25m")
    parser.add_argument("--keep", type=Path, help="a folder in which the model is left for the next call")
    parser.add_argument("--methods", nargs="+", choices=("full", "lora", "qlora"), default=["full", "lora"])
    parser.add_argument("--targets", choices=("all-linear", "attention"), default="all-linear", help="of the adapters")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--remat", choices=("none", "block", "dots"), default="none", help="recomputation, on both sides"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--documents", choices=("packed", "one"), default="packed",
        help="what llmtune is told of its rows: several documents may share one, or one each, as transformers takes them",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=2, help="steps in one measurement")
    return parser


def measure(own: argparse.Namespace) -> dict[str, Any]:
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model((own.keep or Path(scratch)) / own.shape, own.shape, own.dtype)
        for method in own.methods:
            names = ("shape", "batch", "length", "dtype", "remat", "device", "documents", "targets", "steps")
            settings = {"model": str(model), "method": method, **{name: getattr(own, name) for name in names}}
            tokens = own.batch * own.length * own.steps
            print(f"train step, {method}, {own.shape} ({parameter_count(own.shape):,} parameters), {own.batch} x {own.length}, "
                  f"{own.dtype}, remat {own.remat}, rows {own.documents}, {own.device}", flush=True)  # fmt: skip
            found = side_by_side.compare(
                "benchmarks.train_step", settings, pairs=own.pairs, units=tokens, unit="tokens/s"
            )
            if own.device == "gpu":
                for side in ("llmtune", "peer"):
                    mfu = found[side]["tokens/s"] / tokens * own.steps * flops_per_step(settings) / H200_BF16
                    found[side]["mfu"] = mfu
                    print(f"  {side:8s} MFU {mfu:.1%} of {H200_BF16 / 1e12:.0f} TFLOP/s (bfloat16, dense)")
            results[method] = found
    return results


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker", "llmtune"]:
        restart_with_huge_pages()  # as `llmtune train` does
    side_by_side.run(arguments(), prepare_llmtune, prepare_peer, measure)
