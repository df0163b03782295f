"""`llmtune convert`: every layout and back byte for byte, the gate that compares, and nothing half-written."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert import convert as conversion
from checkpoints_convert import layouts, safetensors_writer
from checkpoints_convert.convert import Plan
from checkpoints_convert.layouts import Hints
from checkpoints_convert.safetensors_reader import INDEX, SINGLE
from llmtune.cli import main
from llmtune.conversion import convert, parse_size
from llmtune.errors import LlmtuneError, LlmtuneFormatError
from tests.checkpoints_convert.test_layouts import SCALED
from tests.parity.reference import save_model
from tests.parity.test_roundtrip import assert_same_bytes

EVEN = {"vocab_size": 200}
ROUND_TRIPS = {
    "Llama 3": ("gqa untied", {}, "meta"),
    "Llama 3.2": ("tied", {"rope_parameters": SCALED}, "meta"),
    "multi-head": ("multi-head", {}, "meta"),
    "Mistral": ("mistral", {}, "mistral"),
    "tied Mistral": ("mistral", {"tie_word_embeddings": True}, "mistral"),
    "Mistral with a window": ("mistral", {"sliding_window": 32}, "mistral"),
    "Mixtral": ("mixtral", {}, "mistral"),
    "Hugging Face": ("head_dim unlike hidden / heads", {}, "hf"),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "more", "to"), ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_there_and_back_is_byte_equal(name, more, to, dtype, sharded, tmp_path):
    """Configs too, to the letter."""
    source = save_model(name, tmp_path / "hf", dtype=dtype, **EVEN, **more)
    (source / "tokenizer_config.json").write_text("{}")
    size = 40_000 if sharded else 10**9
    files = 2 if sharded and to == "meta" else 1
    conversion.convert(
        source, tmp_path / "there", Plan(to=to, max_shard_bytes=size, files=files), verify=lambda a, b: None
    )
    like = None if to == "hf" else json.loads((source / "config.json").read_text())
    plan = Plan(hints=Hints(like=like), max_shard_bytes=size)
    conversion.convert(tmp_path / "there", tmp_path / "back", plan, verify=lambda a, b: None)
    assert_same_bytes(source, tmp_path / "back")
    kept = ["config.json", "generation_config.json", "tokenizer_config.json"]
    one, other = ([json.loads((d / n).read_text()) for n in kept] for d in (source, tmp_path / "back"))
    assert one == other and (tmp_path / "there" / "tokenizer_config.json").exists()
    assert (tmp_path / "back" / (INDEX if sharded else SINGLE)).exists()


def test_shards_are_of_the_chosen_size_and_transformers_reads_them(tmp_path, stories):
    convert(stories, tmp_path / "out", max_shard_size="200KB", verify=True)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 4 and all(file.stat().st_size < 210_000 for file in files)
    assert_same_bytes(stories, tmp_path / "out")


def test_verification_compares_logits_of_a_real_model(tmp_path, stories):
    lines = convert(stories, tmp_path / "meta", to="meta", files=4, verify=True)
    assert "logits: equal at 64 positions" in lines and any("bit by bit" in line for line in lines)
    assert "logits: equal at 64 positions" in convert(
        tmp_path / "meta", tmp_path / "back", like=str(stories), verify=True
    )
    assert_same_bytes(stories, tmp_path / "back")


def test_a_chosen_dtype_is_rounded_once_and_verified(tmp_path, stories):
    lines = convert(stories, tmp_path / "out", dtype="bfloat16", verify=True)
    written, source = (load_file(d / SINGLE) for d in (tmp_path / "out", stories))
    assert all(torch.equal(written[name], source[name].bfloat16()) for name in source)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert any(line.startswith("logits: largest difference") for line in lines)


def test_numbers_beyond_float16_are_refused(tmp_path, refusal):
    source = save_model("gqa untied", tmp_path / "hf", dtype=torch.bfloat16)
    stored = load_file(source / SINGLE)
    stored["lm_head.weight"][3, 3] = 1e30
    save_file(stored, source / SINGLE, {"format": "pt"})
    assert "lm_head.weight" in refusal(
        source / SINGLE, conversion.convert, source, tmp_path / "out", Plan(dtype="float16")
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


# --- the gate -----------------------------------------------------------------------------------------------------


def flip(target):
    path = target / SINGLE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_fails_the_verification_and_leaves_nothing(tmp_path, monkeypatch):
    source = save_model("gqa untied", tmp_path / "hf")
    monkeypatch.setattr(conversion, "copy_companions", lambda source, target: flip(target))
    with pytest.raises(LlmtuneFormatError, match=r"verification failed: \S+\.weight reads back"):
        convert(source, tmp_path / "out", verify=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]
    convert(source, tmp_path / "unverified")


def test_another_configuration_fails_the_verification(tmp_path, monkeypatch):
    source = save_model("gqa untied", tmp_path / "hf")

    def change(source, target):
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))

    monkeypatch.setattr(conversion, "copy_companions", change)
    with pytest.raises(LlmtuneFormatError, match="rms_norm_eps reads back differently"):
        convert(source, tmp_path / "out", verify=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_q_and_k_that_are_written_in_the_wrong_order_fail_the_verification(tmp_path, monkeypatch, stories):
    monkeypatch.setattr(layouts, "half_to_interleaved", lambda head_dim: tuple(range(head_dim)))
    with pytest.raises(LlmtuneFormatError, match=r"verification failed: model\.layers\.0\.self_attn\.[qk]_proj"):
        convert(stories, tmp_path / "out", to="meta", verify=True)
    assert not list(tmp_path.iterdir())


# --- nothing half-written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hf", "meta"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.EIO, os.strerror(errno.EIO))], ids=["Ctrl-C", "bad disk"]
)
def test_an_interruption_leaves_nothing(to, error, tmp_path, stories):
    told = []

    def progress(done):
        told.append(done)
        if len(told) == 20:
            raise error

    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else LlmtuneError):
        convert(stories, tmp_path / "out", to=to, progress=progress)
    assert not list(tmp_path.iterdir())


def test_the_command_says_it_in_one_line(tmp_path, stories, capfd, monkeypatch):
    def code(*arguments):
        return main([str(argument) for argument in ("convert", *arguments)])

    assert code(stories, tmp_path / "meta", "--to", "meta", "--verify") == 0
    assert "47 tensors" in capfd.readouterr().out
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    for arguments, said in [
        ((stories, tmp_path / "full"), "exists and is not empty"),
        ((stories, tmp_path / "out"), "are needed, 1.00 kB are free"),
        ((stories, tmp_path / "new" / ".." / "full"), "exists and is not empty"),
        ((stories, ""), "is the current directory"),
        ((tmp_path / "absent", tmp_path / "out"), "not a directory"),
        ((tmp_path / "full", tmp_path / "out"), "no config.json"),
        ((stories, tmp_path / "out", "--to", "mistral"), "LlamaForCausalLM"),
        ((stories, tmp_path / "out", "--max-shard-size", "many"), "--max-shard-size"),
        ((stories, tmp_path / "out", "--dtype", "int8"), "--dtype"),
        ((stories, tmp_path / "out", "--files", "2"), "--files 2: only Meta's layout"),
        ((stories, tmp_path / "out", "--to", "meta", "--max-shard-size", "1GB"), "--max-shard-size: Meta's layout"),
        ((stories, tmp_path / "out", "--rope-scaling-factor", "8"), "--rope-scaling-factor"),
        ((tmp_path / "meta", tmp_path / "out", "--like", "no-such-model"), "no-such-model"),
    ]:
        assert code(*arguments) == 2
        told = capfd.readouterr().err
        assert said in told and told.count("\n") == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["full", "here", "meta"]


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(t) for t in ("5GB", "500 mb", "1GiB", "1.5KB", "7")] == [5 * 10**9, 5 * 10**8, 2**30, 1500, 7]
    for text in ("", "GB", "0", "-5GB", "5GBs", "nan", "9" * 400):
        with pytest.raises(LlmtuneError):
            parse_size(text)


def test_bytes_are_the_same_where_the_kernel_cannot_copy_files(tmp_path, stories, monkeypatch):
    convert(stories, tmp_path / "copied", max_shard_size="300KB")

    def refused(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(safetensors_writer.os, "copy_file_range", refused)
    convert(stories, tmp_path / "read", max_shard_size="300KB")
    one, other = ({f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("copied", "read"))
    assert one == other
