"""Straight to devices: whatever the strategy, each byte is read once, and only pieces of bounded size are ever on the host."""

import os

import jax
import numpy as np
import pytest
import torch

import llmtune
from checkpoints_convert import placing, safetensors_reader
from checkpoints_convert.safetensors_header import read_header
from checkpoints_convert.safetensors_reader import SINGLE
from tests.parity.reference import save_model

SIZES = {
    "vocab_size": 208, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 96,
}  # fmt: skip
MODELS = {
    "untied": ("gqa untied", {}),
    "tied": ("tied", {}),
    "mixture": ("mixtral", {}),
    "odd head_dim": ("head_dim unlike hidden / heads", {"head_dim": 10}),
}


@pytest.fixture
def counted(monkeypatch):
    """How often each byte of the file was read, and the most bytes asked for at once."""
    times, largest, really = np.zeros(0, int), [0], os.preadv

    def start(size):
        nonlocal times
        times, largest[0] = np.zeros(size, int), 0

    def preadv(file, buffers, offset):
        got = really(file, buffers, offset)
        times[offset : offset + got] += 1
        largest[0] = max(largest[0], got)
        return got

    monkeypatch.setattr(safetensors_reader.os, "preadv", preadv)
    return start, lambda: (times, largest[0])


@pytest.mark.parametrize("piece", [2**23, 3000], ids=["whole slices", "in pieces"])
@pytest.mark.parametrize("strategy", [None, "fsdp", "tensor"])
@pytest.mark.parametrize(("name", "more"), MODELS.values(), ids=MODELS.keys())
def test_every_byte_is_read_once_and_lands_where_it_belongs(
    name, more, strategy, piece, tmp_path, counted, monkeypatch
):
    directory = save_model(name, tmp_path / "hf", **{**SIZES, **more})
    expected = llmtune.load(directory, dtype=None).params
    monkeypatch.setattr(placing, "PIECE", piece)
    start, result = counted
    start((directory / SINGLE).stat().st_size)
    model = llmtune.load(directory, strategy=strategy)
    assert model.mesh.size == (1 if strategy is None else 8)
    times, largest = result()
    first = min(info.start for info in read_header(directory / SINGLE).values())
    assert (times[:first] == 0).all() and (times[first:] == 1).all()
    assert largest <= piece
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), expected, model.params)


def test_no_piece_on_the_host_is_larger_than_the_limit(tmp_path, monkeypatch):
    directory = save_model("gqa untied", tmp_path / "hf", **SIZES)
    monkeypatch.setattr(placing, "PIECE", 2048)
    sizes, really = [], np.empty

    def empty(shape, dtype=float, **more):
        made = really(shape, dtype, **more)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(placing.np, "empty", empty)
    llmtune.load(directory, strategy="fsdp")
    monkeypatch.undo()
    assert max(sizes) <= 2048 and len(sizes) > 100


def test_a_dtype_other_than_the_stored_one_is_cast_piece_by_piece(tmp_path, monkeypatch):

    directory = save_model("tied", tmp_path / "hf", dtype=torch.bfloat16, **SIZES)
    stored = llmtune.load(directory, dtype=None).params
    monkeypatch.setattr(placing, "PIECE", 3000)
    for dtype in ("float32", "float16"):
        params = llmtune.load(directory, dtype=dtype, strategy="fsdp").params
        jax.tree.map(
            lambda a, b, dtype=dtype: np.testing.assert_array_equal(np.asarray(a).astype(dtype), np.asarray(b)),
            stored,
            params,
        )
