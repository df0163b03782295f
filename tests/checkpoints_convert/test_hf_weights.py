"""The key set and the shapes are checked both ways, and a model is never held twice while it loads."""

import errno
import json
import os
import re
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import llmtune
from checkpoints_convert.hf_config import read_model_config
from checkpoints_convert.hf_names import tensors
from checkpoints_convert.hf_weights import check_tensors
from checkpoints_convert.safetensors_header import DTYPES
from checkpoints_convert.safetensors_reader import open_directory
from checkpoints_convert.safetensors_writer import Entry, write_file
from llmtune.conversion import convert
from llmtune.errors import LlmtuneError
from tests.parity.reference import save_model


def changed(directory, change):
    """The model with its tensors put through `change`."""
    stored = load_file(directory / "model.safetensors")
    change(stored)
    save_file(stored, directory / "model.safetensors")
    return directory


Q, HEAD, EMBED = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"
TOKENS = np.random.default_rng(0).integers(3, 199, (2, 60))
CHANGES = {
    "missing": (lambda t: t.pop(Q), f"the tensor {Q} is missing"),
    "missing head": (lambda t: t.pop(HEAD), f"the tensor {HEAD} is missing"),
    "extra": (lambda t: t.update(extra=np.ones(3, np.float32)), "the tensor extra is none of this architecture's"),
    "a layer too many": (lambda t: t.update({Q.replace("1", "3"): t[Q].copy()}), r"layers\.3.*is none"),
    "bias": (lambda t: t.update({Q.replace("weight", "bias"): np.ones(48, np.float32)}), "q_proj.bias is none"),
    "transposed": (
        lambda t: t.update({HEAD: np.ascontiguousarray(t[HEAD].T)}),
        r"lm_head.weight has shape \[48, 199\]",
    ),
    "short": (lambda t: t.update({Q: t[Q][:-1].copy()}), r"q_proj.weight has shape \[47, 48\].*asks for \[48, 48\]"),
    "integers": (lambda t: t.update({Q: t[Q].astype(np.int8)}), "is stored as int8"),
    "float64": (lambda t: t.update({Q: t[Q].astype(np.float64)}), "is stored as float64"),
    "float8": (lambda t: t.update({Q: t[Q].astype(DTYPES["F8_E4M3"])}), "is stored as float8_e4m3fn"),
    "a scalar": (lambda t: t.update({Q: np.array(1, np.float32)}), r"q_proj.weight has shape \[\]"),
}


@pytest.mark.parametrize("case", list(CHANGES))
def test_tensors_that_do_not_fit_are_named(tmp_path, case, refusal):
    change, said = CHANGES[case]
    directory = changed(save_model("gqa untied", tmp_path / "hf"), change)
    assert re.search(said, refusal(directory, llmtune.load, directory))


@pytest.mark.parametrize("name", ["gqa untied", "tied", "mistral"])
def test_no_tensor_is_ever_made_up(tmp_path, name, refusal):
    """Transformers starts what is missing at random, with a warning."""
    directory = save_model(name, tmp_path / "hf")
    config, whole = read_model_config(directory), load_file(directory / "model.safetensors")
    assert set(whole) == {tensor.name for tensor in tensors(config)}
    for missing in whole:
        save_file({n: t for n, t in whole.items() if n != missing}, directory / "model.safetensors")
        assert missing in refusal(directory, check_tensors, open_directory(directory), config)


def test_a_tied_head_that_is_stored_again_stays_one_with_the_embedding(tmp_path):
    directory = save_model("tied", tmp_path / "hf")
    changed(directory, lambda t: t.update({HEAD: t[EMBED].copy()}))
    model = llmtune.load(directory)
    np.testing.assert_allclose(model.logits(TOKENS), logits(directory), atol=1e-4, rtol=0)
    model.save(tmp_path / "out")
    saved, source = (load_file(d / "model.safetensors") for d in (tmp_path / "out", directory))
    assert {n: t.tobytes() for n, t in saved.items()} == {n: t.tobytes() for n, t in source.items()}


def test_a_tied_head_that_differs_is_refused_where_transformers_unties_it(tmp_path, refusal):
    directory = save_model("tied", tmp_path / "hf")
    tied = logits(directory)
    changed(directory, lambda t: t.update({HEAD: 2 * t[EMBED]}))
    np.testing.assert_allclose(logits(directory), 2 * tied, rtol=1e-5)  # config.json is overruled there
    assert "differs from the embedding" in refusal(directory, llmtune.load, directory)
    changed(directory, lambda t: t.update({HEAD: t[EMBED].astype(np.float16)}))
    assert "differs from the embedding" in refusal(directory, llmtune.load, directory)


def test_old_rotary_buffers_are_passed_over_as_transformers_does(tmp_path):
    directory = save_model("gqa untied", tmp_path / "hf")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    changed(directory, lambda t: t.update({buffer: np.ones(4, np.float32)}))
    np.testing.assert_allclose(llmtune.load(directory).logits(TOKENS), logits(directory), atol=1e-4, rtol=0)


def test_a_companion_that_cannot_be_copied_leaves_nothing_behind(tmp_path, monkeypatch):
    directory = save_model("tied", tmp_path / "hf")
    (directory / "tokenizer_config.json").write_text("{}")
    model = llmtune.load(directory)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(LlmtuneError, match=r"/out: cannot be written \(No space left on device\)"):
        model.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_companion_that_leads_elsewhere_is_refused_before_anything_is_written(tmp_path, refusal):
    """What it leads to would be copied into an export; the links of a hub cache lead into its own store."""
    hub = tmp_path / "models--a--b"
    directory = save_model("tied", hub / "snapshots" / "1")
    (tmp_path / "secret").write_text("a key")
    link = directory / "LICENSE"
    (hub / "blobs").mkdir()
    (hub / "blobs" / "0abc").write_text("the licence")
    link.symlink_to("../../blobs/0abc")
    llmtune.load(directory).save(tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "the licence"
    link.unlink()
    link.symlink_to(tmp_path / "secret")
    assert "not a regular file inside" in refusal("LICENSE", llmtune.load, directory)
    assert "not a regular file inside" in refusal("LICENSE", convert, directory, tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models--a--b", "out", "secret"]


def logits(directory):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(torch.tensor(TOKENS)).logits.numpy()


def test_mixed_dtypes_on_disk_come_back_as_they_were(tmp_path):
    directory = save_model("gqa untied", tmp_path / "hf")
    changed(directory, lambda t: t.update({Q: t[Q].astype(np.float16), HEAD: t[HEAD].astype(np.float16)}))
    for dtype in ("float32", None):
        llmtune.load(directory, dtype=dtype).save(tmp_path / f"out-{dtype}")
        saved, source = (load_file(d / "model.safetensors") for d in (tmp_path / f"out-{dtype}", directory))
        for name, array in source.items():
            assert saved[name].dtype == array.dtype and saved[name].tobytes() == array.tobytes(), name


MEASURE = """
import sys
import jax
import llmtune

def memory(kind):  # getrusage counts the parent's memory too
    return 1024 * int(open("/proc/self/status").read().split(kind + ":")[1].split()[0])

tiny, large, dtype = sys.argv[1:]
jax.block_until_ready(llmtune.load(tiny).params)
before = memory("VmRSS")
model = llmtune.load(large, dtype=dtype or None)
jax.block_until_ready(model.params)
loaded = memory("VmHWM") - before
model.save(large + "-saved")
print(loaded, memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("dtype", "widened"),
    [pytest.param("", 1, id="as stored"), pytest.param("float32", 2, id="in float32", marks=pytest.mark.nightly)],
)
def test_loading_and_saving_stream(tmp_path, small, dtype, widened):
    """550 MB of bfloat16: the peak is the model and one stacked weight on its way (a fifth of it), not two models."""
    directory = random_model(tmp_path / "hf", layers=24)
    size = widened * (directory / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE, str(small), str(directory), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, saved = (int(number) / size for number in done.stdout.split())
    assert size > widened * 500e6 and 0.9 < loaded <= saved < 1.3, (loaded, saved)


@pytest.fixture
def small(tmp_path):
    """A model of the same structure that weighs nothing."""
    return random_model(tmp_path / "tiny", layers=1, hidden_size=64, intermediate_size=64, vocab_size=64)


def random_model(directory, *, layers, **sizes):
    """Written tensor by tensor, so that this process does not hold it either."""
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2560,
        "num_attention_heads": 16, "num_key_value_heads": 8, "torch_dtype": "bfloat16", **sizes,
    }  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    draw = np.random.default_rng(0).bytes
    entries = [
        Entry(
            t.name,
            DTYPES["BF16"],
            t.shape,
            lambda t=t: np.frombuffer(draw(2 * prod(t.shape)), DTYPES["BF16"]).reshape(t.shape),
        )
        for t in tensors(read_model_config(directory))
    ]
    write_file(directory / "model.safetensors", entries)
    return directory
