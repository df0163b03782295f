"""Models in 8 bits as transformers reads them: every matrix within half a step, everything else as it was."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmtune.cli import main

pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_transformers_reads_the_matrices_back(stories, tmp_path, form, capsys):
    assert main(["export", str(stories), "--quantize", form, "--output", str(tmp_path / "out")]) == 0
    assert "35 matrices" in capsys.readouterr().out
    stored, written = load_file(stories / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    described = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "compressed-tensors"
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    scheme = {name: getattr(own, "quantization_scheme", None) for name, own in read.named_modules()}
    assert sum(own is not None for own in scheme.values()) == 35 and scheme.get("lm_head") is None
    for name, tensor in stored.items():
        if f"{name}_scale" not in written:
            assert torch.equal(written[name], tensor)
            continue
        values = written[name].float() * written[f"{name}_scale"].float()
        gap, scale = (values - tensor.float()).abs(), written[f"{name}_scale"].float()
        assert bool((gap <= (0.51 * scale if form == "int8" else scale * 16.5)).all()), name
    tokens = torch.tensor(np.arange(3, 67)[None])
    whole = AutoModelForCausalLM.from_pretrained(stories)(tokens).logits
    assert (read(tokens).logits - whole).abs().mean() / whole.abs().mean() < 0.1


def test_what_is_refused(stories, tmp_path, capsys):
    assert main(["export", str(stories), "--quantize", "fp8"]) == 2
    assert main(["export", str(tmp_path), "--quantize", "fp8", "--output", str(tmp_path / "x")]) == 2
    shutil.copytree(stories, tmp_path / "twice")
    config = json.loads((tmp_path / "twice/config.json").read_text())
    (tmp_path / "twice/config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    assert main(["export", str(tmp_path / "twice"), "--quantize", "int8", "--output", str(tmp_path / "x")]) == 2
    assert "quantised already" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
