"""Tokens that a run adds: ids of the tokenizer here and of the written files in transformers, and who may make them."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from llmtune.errors import LlmtuneConfigError
from llmtune.tokenizers import AddedTokens, load_tokenizer, write_added_tokens
from tests.tokenizers.corpus import TEXTS

WORD, OTHER, CONTROL = "<|think|>", "C6H12O6", "<|im_start|>"
ADDED = AddedTokens((WORD, OTHER), (CONTROL,))
AROUND = ["{}", "a{}b", " {} ", "a {} b", "{}{}", "\n{}\n", "é{}你好", "<{}>"]


@pytest.fixture(scope="module", params=["llama3", "mistral_v1", "mistral_v3", "stories"])
def source(request, assets):
    return request.getfixturevalue("stories") if request.param == "stories" else assets / "tokenizers" / request.param


@pytest.fixture(scope="module")
def ours(source):
    return load_tokenizer(source, ADDED)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / source.name
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    if source.name == "mistral_v1":  # as published: a class that rebuilds what tokenizer.json says
        config = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    write_added_tokens(directory, ADDED)
    return directory


def test_ids_follow_the_tokenizers_own_and_are_those_of_transformers(source, ours, written):
    theirs, first = AutoTokenizer.from_pretrained(written), load_tokenizer(source).vocab_size
    assert ours.vocab_size == first + 3
    assert [theirs.convert_tokens_to_ids(token) for token in (WORD, OTHER, CONTROL)] == [first, first + 1, first + 2]
    texts = [frame.format(*[token] * 2) for frame in AROUND for token in (WORD, OTHER, CONTROL)]
    for text in [*texts, *TEXTS]:
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text, bos=False) == plain, repr(text)
        parsed = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, bos=False, allow_special=True) == parsed, repr(text)


def test_the_written_files_read_back_as_the_same_tokenizer(ours, written):
    again = load_tokenizer(written)
    assert (again.vocab_size, again.bos_id, again.eos_ids) == (ours.vocab_size, ours.bos_id, ours.eos_ids)
    for text in [frame.format(*[token] * 2) for frame in AROUND for token in (WORD, CONTROL)]:
        assert again.encode(text) == ours.encode(text)
        assert again.decode(ours.encode(text, allow_special=True)) == ours.decode(ours.encode(text, allow_special=True))


def test_words_come_from_text_and_control_tokens_do_not(ours):
    word, control = ours.vocab_size - 3, ours.vocab_size - 1
    for frame in AROUND:
        text = frame.format(*[WORD + CONTROL] * 2)
        assert ours.encode(text).count(word) == frame.count("{}")
        assert control not in ours.encode(text)
        assert ours.encode(text, allow_special=True).count(control) == frame.count("{}")
    assert WORD in ours.decode([word]) and CONTROL not in ours.decode([control])


def test_the_old_ids_stay(source, ours):
    before = load_tokenizer(source)
    assert all(ours.encode(text) == before.encode(text) for text in TEXTS if OTHER not in text)


def test_neighbouring_files_list_them_too(source, ours, written):
    config, first = json.loads((written / "tokenizer_config.json").read_text()), ours.vocab_size - 3
    listed = config["added_tokens_decoder"]
    assert (listed[str(first)]["content"], listed[str(first)]["special"]) == (WORD, False)
    assert (listed[str(first + 2)]["content"], listed[str(first + 2)]["special"]) == (CONTROL, True)
    if (source / "tokenizer.model").exists():
        assert json.loads((written / "added_tokens.json").read_text())[CONTROL] == first + 2


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (AddedTokens(("</s>",)), r"data.add_tokens: '</s>' is a control token already \(id 2\); leave it out"),
        (AddedTokens((), ("<s>",)), r"data.add_special_tokens: '<s>' is a control token already"),
        (AddedTokens(("▁the",)), r"data.add_tokens: '▁the' is in the vocabulary already \(id \d+\)"),
    ],
    ids=["a control token", "as a control token", "a word"],
)
def test_what_is_there_already_is_refused(stories, added, said):
    with pytest.raises(LlmtuneConfigError, match=said):
        load_tokenizer(stories, added)


def test_only_a_tokenizer_json_can_carry_them(stories, tmp_path):
    shutil.copy(stories / "tokenizer.model", tmp_path)
    with pytest.raises(
        LlmtuneConfigError, match=r"add_tokens: .* has no tokenizer.json, the only tokenizer file that can"
    ):
        load_tokenizer(tmp_path, ADDED)
    with pytest.raises(LlmtuneConfigError, match=r"^data\.add_special_tokens"):
        load_tokenizer(tmp_path, AddedTokens((), (CONTROL,)))
