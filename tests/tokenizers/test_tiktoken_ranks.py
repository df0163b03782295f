"""tiktoken's files: Meta's control tokens without settings, the order of files, damage in one line, very long blanks."""

import json
import shutil

import pytest

from llmtune.errors import LlmtuneDataError, LlmtuneFormatError
from llmtune.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def llama(assets):
    return (assets / "tokenizers" / "llama3" / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def tekken(assets):
    return json.loads((assets / "tokenizers" / "tekken" / "tekken.json").read_text())


@pytest.fixture(scope="module")
def alone(llama, tmp_path_factory):
    """Meta's file with nothing beside it."""
    directory = tmp_path_factory.mktemp("meta")
    (directory / "tokenizer.model").write_bytes(llama)
    return load_tokenizer(directory)


def test_without_settings_control_tokens_are_metas(alone):
    names = sorted(alone.controls, key=alone.controls.__getitem__)
    assert alone.vocab_size == 128256 and len(names) == 256 and alone.add_bos
    assert (alone.bos_id, alone.eos_ids) == (128000, (128001, 128008, 128009))
    assert names[:2] + names[4:12] == [
        "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>",
        "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>",
    ]  # fmt: skip
    assert names[12] == "<|reserved_special_token_2|>" and names[-1] == "<|reserved_special_token_245|>"


def test_settings_beside_it_hold(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama)
    listed = {"128005": {"content": "<|mine|>", "special": True}, "7": {"content": "x"}, "999999": {"content": "y"}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|eot_id|>", "add_bos_token": False, "added_tokens_decoder": listed})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128009]}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.add_bos) == ((128009, 128001), False)
    assert tokenizer.encode("<|mine|><|step_id|>", bos=False, allow_special=True)[0] == 128005
    assert "<|step_id|>" not in tokenizer.controls


def test_a_run_of_blanks_that_the_library_cannot_cut_is_one_line(alone):
    assert alone.decode(alone.encode(" " * 499_999 + "x")) == " " * 499_999 + "x"
    with pytest.raises(LlmtuneDataError, match="more than 500000 blanks"):
        alone.encode("a" + " \n" * 500_000 + "b")
    assert len(alone.encode("ab " * 400_000)) > 400_000


@pytest.mark.parametrize("first, second", [("tokenizer.json", "tekken.json"), ("tekken.json", "tokenizer.model")])
def test_the_first_file_of_the_order_decides(assets, tmp_path, first, second):
    places = {"tokenizer.json": "mistral_v3", "tekken.json": "tekken", "tokenizer.model": "llama3"}
    for name in (first, second):
        shutil.copy(assets / "tokenizers" / places[name] / name, tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == {"tokenizer.json": 32768, "tekken.json": 131072}[first]
    (tmp_path / first).write_text("damaged")  # is the answer: the second file may be of another model
    refusal(tmp_path, first)


def test_mistrals_file_names(assets, tmp_path):
    v1, v3 = (assets / "tokenizers" / f for f in ("mistral_v1/tokenizer.model", "mistral_v3/tokenizer.model.v3"))
    shutil.copy(v1, tmp_path / "mistral_instruct_tokenizer_240216.model.v2")
    assert load_tokenizer(tmp_path).vocab_size == 32000
    shutil.copy(v3, tmp_path / "mistral_instruct_tokenizer_240323.model.v3")
    assert load_tokenizer(tmp_path).vocab_size == 32768
    shutil.copy(v1, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).vocab_size == 32000


def refusal(directory, name="tokenizer.model"):
    with pytest.raises(LlmtuneFormatError) as caught:
        load_tokenizer(directory)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and len(said) < 500 and str(directory / name) in said
    return said


def test_ranks_cut_off_anywhere_are_one_line(llama, tmp_path):
    for end in [100, 101, 102, 103, *range(2000, len(llama), len(llama) // 12), len(llama) - 3]:
        (tmp_path / "tokenizer.model").write_bytes(llama[:end])
        refusal(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.replace(b"IQ== 0\n", b"IQ== 1\n", 1),
        lambda raw: raw.replace(b"\nIg== 1\n", b"\nIQ== 1\n", 1),
        lambda raw: raw.replace(b"\nIg== 1\n", b"\n!!== 1\n", 1),
        lambda raw: raw.replace(b"\nIg== 1\n", b"\n\n", 1),
        lambda raw: raw + b"QUJDREVGR0g= 128000\n",
        lambda raw: raw[:5000] + b"\x00" * 100 + raw[5100:],
    ],
)
def test_damaged_ranks_are_one_line(llama, tmp_path, damage):
    (tmp_path / "tokenizer.model").write_bytes(damage(llama))
    refusal(tmp_path)


def test_a_control_token_named_twice_is_one_line(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama)
    listed = {"128005": {"content": "<|eot_id|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    refusal(tmp_path, "tokenizer_config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"config": {"pattern": "x"}},
        {"vocab": []},
        {"vocab": [{"rank": 0}] * 131072},
        {"vocab": "text"},
        {"special_tokens": [{"rank": 5, "token_str": "<s>", "is_control": True}]},
        {"special_tokens": [{"rank": 0}]},
        {"special_tokens": 7},
    ],
)
def test_a_damaged_tekken_is_one_line(tekken, tmp_path, change):
    small = {**tekken, "vocab": tekken["vocab"][:300], "config": {**tekken["config"], "default_vocab_size": 1300}}
    (tmp_path / "tekken.json").write_text(json.dumps(small))
    assert load_tokenizer(tmp_path).vocab_size == 1300
    (tmp_path / "tekken.json").write_text(json.dumps(small | change))
    refusal(tmp_path, "tekken.json")


@pytest.mark.parametrize("pattern", ["[", "(?<=a+)b("])
def test_a_pattern_that_is_none_is_one_line(tekken, tmp_path, pattern):
    config = {**tekken["config"], "default_vocab_size": 1300, "pattern": pattern}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": tekken["vocab"][:300]}))
    refusal(tmp_path, "tekken.json")


def test_a_tekken_cut_off_is_one_line(tekken, tmp_path):
    raw = json.dumps({**tekken, "vocab": tekken["vocab"][:400]})
    for end in range(0, len(raw), len(raw) // 15):
        (tmp_path / "tekken.json").write_text(raw[:end])
        refusal(tmp_path, "tekken.json")
