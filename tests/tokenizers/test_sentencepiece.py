"""Sentencepiece models: ids equal the reference library's, and text never becomes control tokens unless asked to."""

import json
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmtune.errors import LlmtuneDataError, LlmtuneFormatError
from llmtune.models.config import ModelConfig
from llmtune.tokenizers import check_fits, load_tokenizer
from tests.tokenizers.corpus import CONTROLS, TEXTS, real_texts

FILES = {
    "mistral_v1": "tokenizers/mistral_v1/tokenizer.model",
    "mistral_v3": "tokenizers/mistral_v3/tokenizer.model.v3",
    "stories": "models/stories260K/tokenizer.model",
}


@pytest.fixture(scope="module", params=FILES)
def file(request, assets):
    return assets / FILES[request.param]


@pytest.fixture(scope="module")
def ours(file, tmp_path_factory):
    """Read from a directory that has a tokenizer.model alone."""
    directory = tmp_path_factory.mktemp("model")
    shutil.copy(file, directory / "tokenizer.model")
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def theirs(file):
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.fixture(scope="module")
def hugging_face(file):
    """The tokenizer.json beside the model: the reference for control tokens, which sentencepiece never reads from text."""
    return AutoTokenizer.from_pretrained(file.parent)


def controls(theirs):
    return {theirs.id_to_piece(index): index for index in range(len(theirs)) if theirs.is_control(index)}


def test_ids_are_the_references(ours, theirs, assets):
    for text in [*TEXTS, *CONTROLS, *real_texts(assets)]:
        assert ours.encode(text, bos=False) == theirs.encode(text), repr(text)
        assert ours.encode(text) == theirs.encode(text, add_bos=True), repr(text)


@given(text=st.text(max_size=40) | st.lists(st.sampled_from([*CONTROLS, " ", "x"]), max_size=6).map("".join))
@settings(max_examples=60, deadline=None)
def test_ids_of_any_text_are_the_references(ours, theirs, text):
    assert ours.encode(text, bos=False) == theirs.encode(text)


def test_text_never_becomes_control_tokens_but_when_asked_to(ours, theirs):
    known = controls(theirs)
    assert {"<s>", "</s>"} <= known.keys()
    for piece, index in known.items():
        assert not set(known.values()) & set(ours.encode(f"a{piece}b {piece}", bos=False)), piece
        assert ours.encode(f"a{piece}b {piece}", bos=False, allow_special=True).count(index) == 2, piece


def test_control_tokens_in_text_are_read_as_hugging_face_reads_them(ours, hugging_face, assets):
    for text in [*TEXTS, *CONTROLS, *real_texts(assets)[:100]]:
        expected = hugging_face(text, add_special_tokens=False).input_ids
        assert ours.encode(text, bos=False, allow_special=True) == expected, repr(text)


def test_of_control_tokens_that_begin_alike_the_longest_is_read(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[5:12]), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="bpe",
        control_symbols=["<end>", "<end>all"], byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<end>all<end>", bos=False, allow_special=True)
    assert ids == [tokenizer.controls["<end>all"], tokenizer.controls["<end>"]]


def test_bos_and_eos_are_the_references(ours, theirs):
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_id(), (theirs.eos_id(),)) == (1, (2,))
    assert ours.add_bos
    assert ours.vocab_size == len(theirs)


def test_settings_beside_the_model_hold(file, tmp_path):
    shutil.copy(file, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "eos_token": "<s>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (1, 2), False)


def test_decoding_is_the_references_and_leaves_control_tokens_out(ours, theirs, assets):
    for text in [*TEXTS, *CONTROLS, *real_texts(assets)]:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)
        assert ours.decode([*ids, *ours.eos_ids]) == theirs.decode(theirs.encode(text)), repr(text)


def test_decoding_passes_over_ids_that_are_no_tokens(ours):
    """A model's vocabulary may be padded beyond its tokenizer's."""
    ids = ours.encode("hi", bos=False)
    assert ours.decode([*ids, ours.vocab_size, 10**12, -1]) == "hi"


def test_lone_surrogates_are_refused_in_one_line(ours):
    for allow_special in (False, True):
        with pytest.raises(LlmtuneDataError, match=r"lone surrogate \(U\+D83D at character 2\)"):
            ours.encode("ab\ud83dc", allow_special=allow_special)


def test_a_tokenizer_must_fit_the_models_vocabulary(ours, tmp_path):
    for size in (ours.vocab_size, ours.vocab_size + 64):
        check_fits(ours, ModelConfig("LlamaForCausalLM", size, 8, 8, 1, 1, 1, 8), tmp_path)
    with pytest.raises(LlmtuneFormatError, match=f"{tmp_path}: .* do not belong together"):
        check_fits(ours, ModelConfig("LlamaForCausalLM", ours.vocab_size - 1, 8, 8, 1, 1, 1, 8), tmp_path)


def test_tokenizer_json_goes_before_a_model_file(stories):
    assert type(load_tokenizer(stories)).__name__ == "TokenizerJson"


def refusal(directory, raw):
    (directory / "tokenizer.model").write_bytes(raw)
    with pytest.raises(LlmtuneFormatError) as caught:
        load_tokenizer(directory)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and len(said) < 500 and str(directory / "tokenizer.model") in said
    return said


@pytest.mark.parametrize(
    "raw", [b"", b"\x00" * 64, b"nonsense", b"{}\n", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_file_of_something_else_is_one_line(tmp_path, raw):
    assert "not a sentencepiece model" in refusal(tmp_path, raw)


def test_a_model_cut_off_is_one_line(stories, tmp_path):
    raw = (stories / "tokenizer.model").read_bytes()
    for end in range(1, len(raw), len(raw) // 40):
        assert "not a sentencepiece model" in refusal(tmp_path, raw[:end])
