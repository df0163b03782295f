"""The linter shows a row as it is learnt, and names mistakes that can be seen in it."""

from dataclasses import replace

import pytest

from llmtune.tokenizers import load_chat_template
from llmtune.tokenizers.conversation import Rendered
from llmtune.tokenizers.lint import complaints, marked
from tests.tokenizers.conversations import MULTI, SINGLE, said


@pytest.fixture(scope="module", params=["llama3", "mistral_v3", "tekken"])
def tokenizer(request, own):
    return own(request.param)


@pytest.fixture(scope="module")
def row(tokenizer, tmp_path_factory):
    return load_chat_template(tmp_path_factory.mktemp("none"), tokenizer).encode(SINGLE)


def test_a_sound_row_is_shown_and_nothing_is_said(tokenizer, row):
    assert complaints(tokenizer, row) == []
    assert marked(tokenizer, row).endswith(("⟦4<|eot_id|>⟧", "⟦4</s>⟧"))
    assert marked(tokenizer, row, longest=20).startswith(marked(tokenizer, row)[:10] + " ... ")
    assert marked(tokenizer, Rendered([], [])) == ""


def test_mistakes_are_named(tokenizer, row):
    ids, targets = row.ids, row.targets
    doubled = Rendered([tokenizer.bos_id, *ids], [False, *targets])
    cut = Rendered(ids[:-1], targets[:-1])
    spelled = tokenizer.encode(f"x {next(iter(tokenizer.controls))}", bos=False)
    for wrong, why in [
        (doubled, "2 BOS tokens"),
        (Rendered(ids[1:], targets[1:]), "no BOS token"),
        (replace(row, targets=[False] * len(ids)), "no token is a target"),
        (cut, "would not learn to stop"),
        (Rendered([*ids, *spelled], [*targets, *[False] * len(spelled)]), "stands in it as text"),
    ]:
        found = complaints(tokenizer, wrong)
        assert len(found) == 1 and why in found[0] and len(found[0].splitlines()) == 1


def test_several_turns(own, tmp_path):
    template = load_chat_template(tmp_path, own("llama3"), "llama3")
    assert marked(own("llama3"), template.encode(MULTI)).count("⟦") == 3
    assert complaints(own("llama3"), template.encode(said(("user", "only asked")))) == [
        "no token is a target: there is nothing to learn from this row"
    ]
