"""Presets against the published numbers, and `llmtune inspect` against counts of what is really there."""

import jax
import numpy as np
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import llmtune
from llmtune import pretrained
from llmtune.cli import main
from llmtune.errors import LlmtuneConfigError
from llmtune.generation.cache import empty_cache
from llmtune.inspection import (
    active_parameters,
    attention_flops,
    cache_bytes,
    count_parameters,
    inspect,
    matmul_flops,
)
from llmtune.sharding import make_mesh
from llmtune.shipped import configs_directory
from tests.parity.reference import save_model

PUBLISHED = {
    "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800, "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496, "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552, "mathstral-7b": 7_248_023_552, "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-22b": 22_247_282_688, "codestral-22b": 22_247_282_688, "mistral-small-24b": 23_572_403_200,
    "mistral-small-3.1-24b": 23_572_403_200, "ministral-8b": 8_019_808_256, "ministral-3-3b": 3_429_006_336,
    "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112,
}  # fmt: skip
ACTIVE = {"mixtral-8x7b": 12.9e9, "mixtral-8x22b": 39.1e9}  # as announced


def test_every_preset_is_one_that_is_named_here():
    assert {path.stem for path in (configs_directory() / "models").glob("*.yaml")} == {*PUBLISHED, "starter"}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_parameters_are_as_published(name):
    config = pretrained.open_source(name).config
    counts = count_parameters(config)
    assert sum(counts.values()) == PUBLISHED[name]
    assert active_parameters(config, counts) == pytest.approx(ACTIVE.get(name, PUBLISHED[name]), rel=2e-3)
    assert f"{PUBLISHED[name]:,} parameters" in (configs_directory() / "models" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", ["llama3.2-1b", "mistral-nemo-12b", "ministral-8b", "ministral-3-3b", "mixtral-8x7b"])
def test_transformers_makes_the_same_model_of_a_preset(name):
    raw = yaml.safe_load((configs_directory() / "models" / f"{name}.yaml").read_text())
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["ministral, interleaved windows", "mixtral"])
def test_figures_are_those_of_the_program(name, tmp_path):
    """Parameters as loaded, FLOPs as XLA counts them (of a scan's body once, hence one layer or period), cache as allocated."""
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]} if "int" in name else {}
    model = llmtune.load(save_model(name, tmp_path, **({"num_hidden_layers": 1} | layers)))
    config, counts = model.config, count_parameters(model.config)
    assert sum(counts.values()) == sum(leaf.size for leaf in jax.tree.leaves(model.params))
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        for length in (20, 100):
            cache = empty_cache(config, 1, length, np.float32)
            assert cache_bytes(config, length, 4) == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    width = config.num_attention_heads * config.head_dim
    seen = [sum(min(t + 1, window or 1000) for t in range(100)) / 100 for window in config.windows]
    assert attention_flops(config, 100) == round(sum(4 * width * s for s in seen))
    if config.experts is None:
        dense = sum(size for path, size in counts.items() if path.endswith("kernel"))
        assert matmul_flops(config, counts) == 2 * dense
    else:
        experts = sum(size for path, size in counts.items() if "/experts/" in path)
        dense = sum(size for path, size in counts.items() if path.endswith("kernel")) - experts
        assert matmul_flops(config, counts) == 2 * (dense + experts // 4)


def test_what_is_printed(capsys, tmp_path):
    assert main(["inspect", "mixtral-8x7b"]) == 0
    out = capsys.readouterr().out
    for said in ("46,702,792,704", "12,879,925,248", "bfloat16 93.4 GB", "131,072 bytes per token", "2 of 8", "0.02 times",
                 "over rows of 4,096", "own matrix"):  # fmt: skip
        assert said in out, said
    assert "pattern of 4: over all, 32,768" in "\n".join(inspect("ministral-8b"))
    assert "last 4,096 tokens" in "\n".join(inspect("mistral-7b-v0.1"))
    assert "YaRN scaling by 16 beyond 16,384; queries scaled" in "\n".join(inspect("ministral-3-3b"))
    directory = save_model("mistral 3, text tower", tmp_path)
    assert "other towers" in "\n".join(inspect(str(directory))) and "on disk float32" in "\n".join(
        inspect(str(directory))
    )


def test_bad_input(capsys):
    assert main(["inspect", "no-such-model"]) == 2
    assert "neither a directory nor a preset" in capsys.readouterr().err
    with pytest.raises(LlmtuneConfigError, match="length"):
        inspect("llama3-8b", 0)
