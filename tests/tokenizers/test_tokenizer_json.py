"""tokenizer.json: ids equal transformers', and text never becomes control tokens unless asked to."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmtune.errors import LlmtuneDataError, LlmtuneFormatError
from llmtune.models.config import ModelConfig
from llmtune.tokenizers import check_fits, load_tokenizer
from tests.tokenizers.corpus import CONTROLS, TEXTS, real_texts

NAMES = ["llama3", "mistral_v1", "mistral_v3", "stories"]
ENDS = {
    "llama3": ("<|begin_of_text|>", ["<|eot_id|>"]),
    "mistral_v1": ("<s>", ["</s>"]),
    "mistral_v3": ("<s>", ["</s>"]),
    "stories": ("<s>", ["</s>", "<s>"]),  # generation_config.json ends at BOS too
}


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def directory(name, request):
    if name == "stories":
        return request.getfixturevalue("stories")
    return request.getfixturevalue("assets") / "tokenizers" / name


@pytest.fixture(scope="module")
def ours(directory):
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def theirs(directory):
    return AutoTokenizer.from_pretrained(directory)


def reference(theirs, text, *, bos=False, allow_special=False):
    return theirs(text, add_special_tokens=bos, split_special_tokens=not allow_special).input_ids


def control_ids(theirs):
    return {index for index, token in theirs.added_tokens_decoder.items() if token.special}


def test_ids_are_the_references(ours, theirs, assets):
    for text in [*TEXTS, *CONTROLS, *real_texts(assets)]:
        assert ours.encode(text, bos=False) == reference(theirs, text), repr(text)
        assert ours.encode(text, bos=False, allow_special=True) == reference(theirs, text, allow_special=True), repr(
            text
        )


@given(text=st.text(max_size=40) | st.lists(st.sampled_from([*CONTROLS, " ", "x", "\n"]), max_size=6).map("".join))
@settings(max_examples=60, deadline=None)
def test_ids_of_any_text_are_the_references(ours, theirs, text):
    assert ours.encode(text, bos=False) == reference(theirs, text)
    assert ours.encode(text, bos=False, allow_special=True) == reference(theirs, text, allow_special=True)


def test_text_never_becomes_control_tokens_but_when_asked_to(ours, theirs, name):
    controls = control_ids(theirs)
    for index in controls:
        token = theirs.convert_ids_to_tokens(index)
        assert not controls & set(ours.encode(f"a{token}b {token}", bos=False)), token
        assert index in ours.encode(f"a{token}b {token}", bos=False, allow_special=True), token
    assert len(controls) == {"llama3": 256, "mistral_v1": 3, "mistral_v3": 751, "stories": 3}[name]


def test_bos_and_eos_are_the_references(ours, theirs, name):
    begin, ends = ENDS[name]
    assert ours.bos_id == theirs.bos_token_id == theirs.convert_tokens_to_ids(begin)
    assert ours.eos_ids == tuple(map(theirs.convert_tokens_to_ids, ends))
    assert ours.eos_ids[0] == theirs.eos_token_id
    assert ours.add_bos and theirs("x").input_ids[0] == ours.bos_id


def test_bos_is_put_first_exactly_once(ours, theirs, assets):
    for text in [*TEXTS, *CONTROLS]:
        ids = ours.encode(text)
        assert ids == [ours.bos_id, *ours.encode(text, bos=False)]
        assert ids.count(ours.bos_id) == 1
    for text in real_texts(assets):
        assert ours.encode(text) == reference(theirs, text, bos=True)


def test_decoding_is_the_references_and_leaves_control_tokens_out(ours, theirs, assets):
    for text in [*TEXTS, *CONTROLS, *real_texts(assets)]:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text, repr(text)
        ids = ours.encode(text, allow_special=True)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode([ours.bos_id, *ours.encode("hi", bos=False), *ours.eos_ids]) == "hi"


def test_decoding_passes_over_ids_that_are_no_tokens(ours):
    """A model's vocabulary may be padded beyond its tokenizer's."""
    ids = ours.encode("hi", bos=False)
    assert ours.decode([*ids, ours.vocab_size, 10**12, -1]) == "hi"


def test_the_vocabulary_is_as_large_as_the_references(ours, theirs):
    assert ours.vocab_size == len(theirs)


def test_lone_surrogates_are_refused_in_one_line(ours):
    for bos in (False, True):
        with pytest.raises(LlmtuneDataError, match=r"lone surrogate \(U\+D83D at character 2\)"):
            ours.encode("ab\ud83dc", bos=bos)


def fitted(vocab_size):
    return ModelConfig("LlamaForCausalLM", vocab_size, 8, 8, 1, 1, 1, 8)


def test_a_tokenizer_must_fit_the_models_vocabulary(ours):
    home = Path("models/mine")
    check_fits(ours, fitted(ours.vocab_size), home)
    check_fits(ours, fitted(ours.vocab_size + 64), home)
    said = f"models/mine: its tokenizer gives ids up to {ours.vocab_size - 1}, the model's vocabulary has"
    with pytest.raises(LlmtuneFormatError, match=said):
        check_fits(ours, fitted(ours.vocab_size - 1), home)


@pytest.fixture
def copy(starter, tmp_path):
    """The starter's tokenizer, to be damaged."""
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        shutil.copy(starter / file, tmp_path / file)
    return tmp_path


def refusal(directory):
    with pytest.raises(LlmtuneFormatError) as caught:
        load_tokenizer(directory)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and len(said) < 500 and str(directory) in said
    return said


def test_without_files_there_is_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_whether_bos_comes_first_is_said_by_tokenizer_config(copy):
    for said in (True, False):
        (copy / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": said}))
        tokenizer = load_tokenizer(copy)
        assert tokenizer.add_bos is said and tokenizer.encode("x")[0] == tokenizer.bos_id == 0


@pytest.mark.parametrize("model, expected", [("starter", False), ("stories", True)])
def test_where_it_does_not_say_the_template_does_as_in_the_reference(request, tmp_path, model, expected):
    shutil.copy(request.getfixturevalue(model) / "tokenizer.json", tmp_path)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.add_bos is (theirs("x").input_ids[0] == theirs.bos_token_id) is expected


def test_bos_and_eos_are_those_of_the_model_where_the_tokenizer_has_no_settings(copy):
    (copy / "tokenizer_config.json").unlink()
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    tokenizer = load_tokenizer(copy)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (0, (7, 1), False)
    (copy / "config.json").write_text(json.dumps({"bos_token_id": -1}))  # some configurations spell None like this
    (copy / "generation_config.json").unlink()
    tokenizer = load_tokenizer(copy)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, ())
    assert tokenizer.encode("x") == tokenizer.encode("x", bos=False)


@pytest.mark.parametrize("damage", ["", "{", "[]", "5", "null", '{"version": "1.0"}', "\x00\x01", "<html>\n</html>"])
def test_a_damaged_tokenizer_is_one_line(copy, damage):
    (copy / "tokenizer.json").write_text(damage)
    assert refusal(copy).startswith(f"{copy / 'tokenizer.json'}: not a tokenizer")


def test_a_tokenizer_cut_off_anywhere_is_one_line(copy):
    path = copy / "tokenizer.json"
    raw = path.read_bytes().strip()
    for end in range(0, len(raw), len(raw) // 40):
        path.write_bytes(raw[:end])
        assert "not a tokenizer" in refusal(copy)


@pytest.mark.parametrize("model", ["BPE", "Nonsense", None])
def test_a_tokenizer_of_unknown_parts_is_one_line(copy, model):
    path = copy / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": {"type": model}}))
    assert "not a tokenizer" in refusal(copy)


@pytest.mark.parametrize(
    "file, damage",
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        pytest.param("tokenizer_config.json", "[" * 100_000, id="deep"),
        ("tokenizer_config.json", '{"bos_token": 5}'),
        ("tokenizer_config.json", '{"eos_token": {"id": 5}}'),
        ("tokenizer_config.json", '{"eos_token": ["</s>"]}'),
        ("special_tokens_map.json", "nonsense"),
        ("generation_config.json", '{"eos_token_id": "</s>"}'),
        ("generation_config.json", '{"eos_token_id": [1, null]}'),
        ("config.json", '{"bos_token_id": 1.5}'),
    ],
)
def test_damaged_settings_are_one_line(copy, file, damage):
    (copy / file).write_text(damage)
    refusal(copy)
