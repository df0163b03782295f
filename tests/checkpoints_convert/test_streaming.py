"""A base in 4 bits never exists in 16: the memory of a process that loads one, and of one that loads it as it is stored."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints_convert.hf_config import parse_model_config
from checkpoints_convert.hf_names import tensors
from tests.conftest import ROOT

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 1024,
    "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LOAD = """
import pathlib, re, sys
import jax
from llmtune import pretrained
from llmtune.model import build_params
from llmtune.models.decoder import declare
from llmtune.sharding import REPLICATED, make_mesh
from llmtune.transforms import identity, quantize
def load(path, form):
    source, kept = pretrained.open_source(path), quantize(form) if form else identity
    declared = declare(source.config)[1]
    declared = kept.apply(declared, kept.init(declared))
    mesh = make_mesh({}, jax.devices()[:1])
    return build_params(source, declared, identity, mesh, REPLICATED, dtype=None)
own = pathlib.Path("/proc/self")
def memory(field): return int(re.search(field + r":\\s+(\\d+)", (own / "status").read_text()).group(1)) * 1024
load(sys.argv[1], sys.argv[3])  # a model of one layer: what compiling takes
before = memory("VmRSS")
(own / "clear_refs").write_text("5")  # the peak begins anew
model = load(sys.argv[2], sys.argv[3])
print(memory("VmHWM") - before)
"""


def write(directory, layers):
    config = {**CONFIG, "num_hidden_layers": layers}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    drawn = {
        t.name: (rng.standard_normal(t.shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        for t in tensors(parse_model_config(config, None, "config.json"))
    }
    save_file(drawn, directory / "model.safetensors")
    return sum(array.nbytes for array in drawn.values())


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_peak_memory_of_loading_in_four_bits(tmp_path):
    write(tmp_path / "small", 1)
    stored = write(tmp_path / "large", 20)

    def taken(form):
        command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large"), form]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1])

    whole, nf4 = taken(""), taken("nf4")
    print(
        f"stored {stored / 1e6:.0f} MB; loaded as stored {whole / 1e6:.0f} MB more at the peak, as nf4 {nf4 / 1e6:.0f} MB"
    )
    assert whole > 0.8 * stored  # what is measured is memory
    assert nf4 < 0.45 * stored  # 4.13 of 16 bits, and one layer of one weight with what encodes it
