"""Many adapters in one batch against one adapter for all of it, in turn in one process.

    python -m benchmarks.adapter_bank                 64 adapters of rank 8, 64 rows of 64 tokens, the 25 M model, float32

Work is a forward pass over all rows, and then a step of decoding: one token of each row through a cache. First every row of
the bank is held against its own adapter served alone.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import llmtune
from benchmarks.shapes import parameter_count, write_model
from checkpoints_convert.peft import write_adapter
from checkpoints_convert.peft.lora import Factors, LoraValues
from llmtune.generation.engine import SLICE
from llmtune.transforms import select, weights_by_path


def write_adapters(directory: Path, model: llmtune.Model, number: int, rank: int) -> list[Path]:
    """So many LoRA adapters of random numbers on all linear layers."""
    weights = weights_by_path(model.params)
    rng, written = np.random.default_rng(0), []
    for n in range(number):
        factors = {}
        for path in select(model.params, "all-linear"):
            layers, n_in, n_out = weights[path].shape
            a = rng.uniform(-(n_in**-0.5), n_in**-0.5, (layers, n_in, rank)).astype(np.float32)
            b = (0.02 * rng.standard_normal((layers, rank, n_out))).astype(np.float32)
            factors[path] = Factors(a, b, np.full(layers, 2.0, np.float32), None)
        written.append(directory / f"adapter-{n}")
        write_adapter(written[-1], "LORA", LoraValues(factors, False), model.config, base="")
    return written


def compiled_forward(model: llmtune.Model) -> Callable[[Any, np.ndarray], jax.Array]:
    """(params, tokens) -> hidden states of all rows; the head is the same for all, and left out."""

    def hidden(params: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        with model.strategy.active():
            return model.bind(params).hidden(tokens, positions, segments)[0]

    compiled = jax.jit(hidden)

    def forward(params: Any, tokens: np.ndarray) -> jax.Array:
        tokens = tokens.astype(np.int32)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        with jax.set_mesh(model.mesh):
            return jax.block_until_ready(compiled(params, tokens, positions, np.ones_like(tokens)))

    return forward


def pairs_of(one: Callable[[], float], other: Callable[[], float], number: int) -> list[tuple[float, float]]:
    """Both measured `number` times in turn; which goes first alternates."""
    found = []
    for k in range(number):
        if k % 2:
            second, first = other(), one()
        else:
            first, second = one(), other()
        found.append((first, second))
    return found


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report(what: str, pairs: list[tuple[float, float]]) -> None:
    bank, single = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [b / s for b, s in pairs]
    print(
        f"{what}: bank {bank * 1e3:.1f} ms, one adapter {single * 1e3:.1f} ms, ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {len(pairs)} pairs)",
        flush=True,
    )


def step_seconds(model: llmtune.Model, prompts: list[list[int]]) -> float:
    """Seconds per decoded token: what two slices take more than one, so that the prompts' pass falls out."""
    short, long = (seconds(lambda n=n: model.generate(prompts, max_new_tokens=n * SLICE)) for n in (1, 3))
    return (long - short) / (2 * SLICE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of measurements")
    own = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = write_model(Path(scratch) / "25m", "25m", "float32")
        directories = write_adapters(Path(scratch), llmtune.load(base), own.adapters, own.rank)
        bank = llmtune.load_bank(base, directories)
        single = llmtune.load(base, adapters=directories[:1])
        print(
            f"{own.adapters} adapters of rank {own.rank}, {own.rows} rows of {own.length} tokens, Llama 25m "
            f"({parameter_count('25m'):,} parameters), float32, {jax.devices()[0].device_kind}",
            flush=True,
        )
        tokens = np.random.default_rng(1).integers(3, 8000, (own.rows, own.length))
        chosen = [bank.names[(7 * row) % own.adapters] for row in range(own.rows)]  # not in their order
        mixed = bank.rows(chosen)
        forward = compiled_forward(single)
        together, difference = np.asarray(forward(mixed.params, tokens)), 0.0
        for name, row in dict(zip(chosen, range(own.rows), strict=True)).items():
            alone = np.asarray(forward(llmtune.load(base, adapters=[name]).params, tokens[row : row + 1]))
            difference = max(difference, float(np.abs(together[row] - alone[0]).max()))
        print(f"hidden states of each row against its adapter alone: {difference:.1e} apart at most", flush=True)
        works = [lambda params=model.params: forward(params, tokens) for model in (mixed, single)]
        for work in works:
            work()
        report("forward", pairs_of(*(lambda work=work: seconds(work) for work in works), own.pairs))
        prompts = tokens[:, :16].tolist()
        steps = [lambda model=model: step_seconds(model, prompts) for model in (mixed, single)]
        for step in steps:
            step()
        report("a step of decoding", pairs_of(*steps, max(3, own.pairs // 2)))


if __name__ == "__main__":
    main()
