"""Directories of virtual tokens and of bottlenecks: what is written is read, and what does not fit is refused by name."""

import json

import numpy as np
import pytest
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from safetensors.numpy import load_file, save_file

from checkpoints_convert.peft import directory, read_adapter, virtual, write_adapter
from checkpoints_convert.peft.bottleneck import Branches
from checkpoints_convert.peft.vllm import findings
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import ModelConfig

CONFIG = ModelConfig("LlamaForCausalLM", 64, 32, 48, 3, 4, 2, 8)
DOWN, SLOT = "layers/0/mlp/down/kernel", "layers/0/mlp/adapter"
rng = np.random.default_rng(0)


def fields(*lead, size=5, hidden=32, heads=False):
    shapes = {"down": (hidden, size), "down_bias": (size,), "up": (size, hidden), "up_bias": (hidden,)}
    own = {name: rng.standard_normal((*lead, *shape)).astype(np.float32) for name, shape in shapes.items()}
    every = {
        name: rng.standard_normal((lead[0], hidden, hidden)).astype(np.float32) for name in ("query", "key", "value")
    }
    return own | (every if heads else {})


def prefix(layers=3, number=4, width=16):
    return virtual.Prefix(*(rng.standard_normal((layers, number, width)).astype(np.float32) for _ in range(2)))


VALUES = {
    "LLMTUNE_SEQUENTIAL": Branches({DOWN: fields(3), "layers/0/attention/o/kernel": fields(3)}, {}),
    "LLMTUNE_PARALLEL": Branches({SLOT: fields(3)}, {SLOT: np.full(3, 2.5, np.float32)}),
    "LLMTUNE_FUSION": Branches({DOWN: fields(3, 2, heads=True)}, {}),
    "PROMPT_TUNING": virtual.Prompt(rng.standard_normal((4, 32)).astype(np.float32)),
    "P_TUNING": virtual.Prompt(rng.standard_normal((4, 32)).astype(np.float32)),
    "PREFIX_TUNING": prefix(),
}


def arrays(values):
    """`{name: array}` of any of these kinds."""
    if not isinstance(values, Branches):
        return dict(vars(values))
    return {f"{path}/{name}": value for path, own in values.fields.items() for name, value in own.items()}


@pytest.mark.parametrize("method", list(VALUES))
def test_what_is_written_is_read(tmp_path, method):
    write_adapter(tmp_path / "a", method, VALUES[method], CONFIG, base="base")
    again = read_adapter(tmp_path / "a", CONFIG)
    assert again.method == method and not again.whole
    one, other = arrays(VALUES[method]), arrays(again.values)
    assert set(one) == set(other)
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
    if method == "LLMTUNE_PARALLEL":
        np.testing.assert_array_equal(again.values.scales[SLOT], VALUES[method].scales[SLOT])


KEY = "base_model.model.model.layers.1.mlp.down_proj.adapter.up"
DAMAGES = {
    "a field": ("LLMTUNE_SEQUENTIAL", lambda t: t.pop(KEY), "has up in 2 places, not in 3 (layer 1, adapter 0)"),
    "a kind of field": (
        "LLMTUNE_SEQUENTIAL", lambda t: [t.pop(key) for key in list(t) if key.endswith("up_bias")], "lacks up_bias"
    ),
    "another module": ("LLMTUNE_SEQUENTIAL", lambda t: t.update({KEY.replace("down_proj", "experts"): t[KEY]}), "is no part"),
    "another width": ("LLMTUNE_SEQUENTIAL", lambda t: t.update({KEY: t[KEY][:, :2].copy()}), "up of several shapes"),
    "a fusion's head": ("LLMTUNE_FUSION", lambda t: t.pop(KEY.replace("adapter.up", "fusion.key")), "key in 2 places"),
    "another base": ("PROMPT_TUNING", lambda t: t.update(prompt_embeddings=np.zeros((4, 30), np.float32)), "another base"),
    "fewer tokens": ("PREFIX_TUNING", lambda t: t.update(prompt_embeddings=t["prompt_embeddings"][:3]), "its tensor has 3"),
    "other tensors": ("P_TUNING", lambda t: t.update(mlp_head=np.zeros(3, np.float32)), "mlp_head is no prompt_embeddings"),
    "no tensors": ("PROMPT_TUNING", lambda t: t.clear(), "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(DAMAGES))
def test_what_does_not_fit_is_refused(tmp_path, case):
    method, damage, said = DAMAGES[case]
    write_adapter(tmp_path / "a", method, VALUES[method], CONFIG, base="base")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(LlmtuneFormatError) as error:
        read_adapter(tmp_path / "a", CONFIG)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [("PREFIX_TUNING", "num_transformer_submodules", 2), ("PROMPT_TUNING", "a_field_of_tomorrow", 1),
     ("LLMTUNE_SEQUENTIAL", "non_linearity", "swish"), ("LLMTUNE_PARALLEL", "scale", "4")],
)  # fmt: skip
def test_a_wrong_field_is_named(tmp_path, method, field, value):
    write_adapter(tmp_path / "a", method, VALUES[method], CONFIG, base="base")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(LlmtuneFormatError, match=f"{field} is {value!r}"):
        read_adapter(tmp_path / "a", CONFIG)


def test_no_other_server_is_promised_what_cannot_be_merged(tmp_path):
    write_adapter(tmp_path / "a", "PREFIX_TUNING", VALUES["PREFIX_TUNING"], CONFIG, base="base")
    (found,) = findings(directory.open_peft(tmp_path / "a"))
    assert found.blocks and "cannot be merged" in found.mend


def test_every_field_of_peft_is_accounted_for():
    known = directory.READ | directory.HARMLESS | virtual.READ | virtual.HARMLESS | set(virtual.REFUSED)
    for kind in (PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig):
        assert not set(kind(task_type="CAUSAL_LM", num_virtual_tokens=2).to_dict()) - known
