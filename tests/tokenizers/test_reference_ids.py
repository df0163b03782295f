"""Every tokenizer, from every file that tells it, gives the ids of the library that its model was trained with."""

import json
import shutil

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tiktoken.load import load_tiktoken_bpe

from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers import load_tokenizer
from tests.tokenizers.corpus import CONTROLS, real_texts, tricky

FILES = {  # what a directory has to hold, and the class that reads it
    "llama3/tokenizer.model": "TiktokenRanks",
    "llama3/tokenizer.json": "TokenizerJson",
    "mistral_v1/tokenizer.model": "SentencePiece",
    "mistral_v1/tokenizer.json": "TokenizerJson",
    "mistral_v3/tokenizer.model.v3": "SentencePiece",
    "mistral_v3/tokenizer.json": "TokenizerJson",
    "tekken/tekken.json": "TiktokenRanks",
}


@pytest.fixture(scope="module", params=FILES)
def file(request, assets):
    return assets / "tokenizers" / request.param


@pytest.fixture(scope="module")
def ours(file, tmp_path_factory):
    """Read from a directory that holds this file and the settings beside it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(file, directory / file.name)
    if (file.parent / "tokenizer_config.json").is_file():
        shutil.copy(file.parent / "tokenizer_config.json", directory)
    tokenizer = load_tokenizer(directory)
    assert type(tokenizer).__name__ == FILES[f"{file.parent.name}/{file.name}"]
    return tokenizer


@pytest.fixture(scope="module")
def theirs(file, assets):
    """The library's own ids of a text that spells no control tokens: tiktoken, sentencepiece or mistral-common."""
    folder = assets / "tokenizers" / file.parent.name
    if folder.name == "llama3":
        ranks = load_tiktoken_bpe(str(folder / "tokenizer.model"))
        splits = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][0]
        encoding = tiktoken.Encoding(
            "llama3", pat_str=splits["pattern"]["Regex"], mergeable_ranks=ranks, special_tokens={}
        )
        return encoding.encode_ordinary
    if folder.name == "tekken":
        tekkenizer = Tekkenizer.from_file(folder / "tekken.json")
        return lambda text: tekkenizer.encode(text, bos=False, eos=False)
    model = sentencepiece.SentencePieceProcessor(model_file=str(next(folder.glob("tokenizer.model*"))))
    return model.encode


def test_there_are_at_least_300_texts():
    assert len(tricky()) >= 300


def test_ids_are_the_references(ours, theirs, assets):
    for text in [*tricky(), *real_texts(assets)]:
        assert ours.encode(text, bos=False) == theirs(text), repr(text)
        assert ours.encode(text) == [ours.bos_id, *theirs(text)], repr(text)


@given(text=st.text(max_size=40) | st.lists(st.sampled_from([*CONTROLS, " ", "x", "\n"]), max_size=6).map("".join))
@settings(max_examples=60, deadline=None)
def test_ids_of_any_text_are_the_references(ours, theirs, text):
    assert ours.encode(text, bos=False) == theirs(text)


def test_a_batch_is_what_its_texts_are(ours):
    for allow_special in (False, True):
        expected = [ours.encode(text, allow_special=allow_special) for text in tricky()]
        assert ours.encode_batch(tricky(), allow_special=allow_special) == expected
    assert ours.encode_batch([]) == []
    with pytest.raises(LlmtuneDataError, match="lone surrogate"):
        ours.encode_batch(["fine", "ab\ud83dc"])


def test_decoding_gives_the_text_back(ours):
    for text in tricky():
        assert ours.decode(ours.encode(text)) == text, repr(text)
        assert ours.decode([*ours.encode(text), *ours.eos_ids, ours.vocab_size, -1]) == text, repr(text)


def test_spans_tile_the_text(ours):
    """Each token lies where it was read: its span decodes to what the ids from there decode to."""
    for text in tricky():
        for allow_special in (False, True):
            ids, spans = ours.encode_spans(text, allow_special=allow_special)
            assert ids == ours.encode(text, bos=False, allow_special=allow_special)
            covered = [False] * len(text)
            for begin, end in spans:
                covered[begin:end] = [True] * (end - begin)
            assert all(covered), (text, spans)
            assert spans == sorted(spans), text
            for token, (begin, end) in zip(ids, spans, strict=True):
                if token in ours.controls.values():
                    assert ours.controls[text[begin:end]] == token


def test_no_text_becomes_a_control_token_but_when_asked_to(ours):
    known = set(ours.controls.values())
    for spelling, token in ours.controls.items():
        assert not known & set(ours.encode(f"a{spelling}b {spelling}", bos=False)), spelling
        assert ours.encode(f"a{spelling}b {spelling}", bos=False, allow_special=True).count(token) == 2, spelling


def test_control_tokens_are_those_of_hugging_face(file, ours, hugging_face):
    if not (file.parent / "tokenizer_config.json").is_file():
        pytest.skip("mistral-common's format; its control tokens are compared below")
    theirs = hugging_face(file.parent.name)
    special = {t.content: i for i, t in theirs.added_tokens_decoder.items() if t.special and t.content != "<unk>"}
    assert {name: i for name, i in ours.controls.items() if name != "<unk>"} == special
    assert (ours.bos_id, ours.eos_ids[0], ours.vocab_size) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        len(theirs),
    )
    assert ours.add_bos
    for text in [*tricky()[::3], *CONTROLS]:
        assert ours.encode(text, bos=False, allow_special=True) == theirs(text, add_special_tokens=False).input_ids


def test_tekkens_control_tokens_come_first(assets):
    folder = assets / "tokenizers" / "tekken"
    ours, theirs = load_tokenizer(folder), Tekkenizer.from_file(folder / "tekken.json")
    assert ours.controls == {theirs.id_to_piece(i): i for i in range(1000)}
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (theirs.bos_id, (theirs.eos_id,), theirs.n_words)
    assert ours.add_bos
    for text in tricky():
        assert ours.decode(theirs.encode(text, bos=True, eos=True)) == text
