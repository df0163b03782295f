"""The compiled programs of real topologies call the kernels, each device with its own shard, its window and its segment ids."""

import re

import pytest

from llmtune import pretrained
from llmtune.config.file import build_run
from llmtune.planning import ahead
from llmtune.planning.layout import lay_out
from llmtune.planning.topology import devices, parse_topology

pytest.importorskip("libtpu")

ROWS, LENGTH, BLOCK = 16, 8192, 512


@pytest.fixture
def operands(monkeypatch):
    """(model, topology, sharding) -> {kernel: shapes of what it is given on one device} of a LoRA's step."""

    def operands(model, topology, sharding):
        tree = {
            "model": model, "output": "nowhere", "objective": "pretrain", "sharding": sharding,
            "data": {"train": "nowhere.jsonl", "sequence_length": LENGTH},
            "adapt": {"method": "lora", "rank": 8, "targets": "attention"},
            "train": {"batch_size": ROWS, "dtype": "bfloat16", "remat": "block"},
        }  # fmt: skip
        run, place, texts = build_run(tree, "test"), parse_topology(topology), []
        read = ahead.read
        monkeypatch.setattr(ahead, "read", lambda text: (texts.append(text), read(text))[1])
        ahead.assign_step(lay_out(run, pretrained.open_source(run.model), place, devices(place)))
        calls = re.findall(
            r"%([a-z_]+)[.\d]* = .*tpu_custom_call.*?operand_layout_constraints=\{(.*?)\}, front", texts[-1]
        )
        return {name: re.findall(r"\w+\[[\d,]*\]", given) for name, given in calls}

    return operands


@pytest.mark.parametrize(
    ("model", "reached"), [("mistral-7b-v0.1", 9), pytest.param("mistral-7b-v0.2", 16, marks=pytest.mark.nightly)]
)
def test_attention_is_a_kernel_over_a_devices_rows_and_heads(operands, model, reached):
    """Of 16 rows 4, of 32 heads 16, of 8 key heads 4; a window of 4,096 tokens reaches 9 of 16 blocks, no window all."""
    found = operands(model, "v5e:2x4", {"strategy": "fsdp_tensor", "mesh": {"fsdp": 4, "tensor": 2}})
    forward = found["splash_mha_fwd_segmented_residuals"]
    assert forward[:2] == [f"s8[1,{LENGTH // BLOCK},{reached}]"] * 2
    assert forward[2:5] == ["bf16[4,16,8192,128]", "bf16[4,4,8192,128]", "bf16[4,4,8192,128]"]
    assert [shape for shape in forward if shape.startswith("s32[4,")] == [
        "s32[4,8192,128]",
        "s32[4,8,8192]",
    ]  # segment ids
    assert {"splash_mha_dq_segmented_no_residuals", "splash_mha_dkv_segmented_no_residuals"} < found.keys()


@pytest.mark.nightly
def test_experts_are_a_kernel_over_a_devices_tokens(operands):
    """4 rows of 8,192 tokens with 2 experts each are 65,536 sorted rows, for all 8 experts."""
    found = operands("mixtral-8x7b", "v5p:2x2x1", {"strategy": "fsdp", "mesh": {"fsdp": 4}})
    assert found["gmm"][-2:] == ["bf16[65536,14336]", "bf16[8,14336,4096]"]
    assert found["splash_mha_fwd_segmented_residuals"][2:4] == ["bf16[4,32,8192,128]", "bf16[4,8,8192,128]"]
