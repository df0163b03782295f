"""A model's own template: the ids of apply_chat_template, targets that match its masks, errors in one line."""

import json
import shutil
from functools import partial

import pytest

from llmtune.errors import LlmtuneDataError, LlmtuneFormatError
from llmtune.tokenizers import load_chat_template, load_tokenizer
from llmtune.tokenizers.conversation import Message
from tests.tokenizers.conversations import (
    MULTI,
    ONE_TOOL,
    PLAIN,
    QUESTION,
    SINGLE,
    SYSTEM,
    TWO_CALLS,
    UNTRAINED,
    call,
    for_transformers,
    said,
)
from tests.tokenizers.marking import marked
from tests.tokenizers.templates import (
    GENERATION,
    JOINED,
    MISTRAL_V1,
    MISTRAL_V3,
    PLAIN_TEXT,
    TRANSFORMING,
    WITHOUT_END,
)

EDGES = said(
    ("user", "\n\nleading and trailing \n"), ("assistant", "  two blanks"), ("user", "]"), ("assistant", "'ll"),
    ("user", " "), ("assistant", "1"), ("user", "é\u0301"), ("assistant", ">\n\n"),
)  # fmt: skip
CASES = {  # kind: folder, template (None: the published one in the assets), conversations
    "llama3.1": ("llama3", None, [*PLAIN.values(), SYSTEM, EDGES, ONE_TOOL]),
    "generation": ("llama3", GENERATION, [*PLAIN.values(), SYSTEM, EDGES]),
    "generation without end": ("llama3", WITHOUT_END, [*PLAIN.values(), SYSTEM, EDGES]),
    "plain text": ("llama3", PLAIN_TEXT, [*PLAIN.values(), SYSTEM, EDGES]),
    "plain text, mistral": ("mistral_v3", PLAIN_TEXT, [*PLAIN.values(), SYSTEM, EDGES]),
    "mistral v1": ("mistral_v1", MISTRAL_V1, [*PLAIN.values(), EDGES]),
    "mistral v3": ("mistral_v3", MISTRAL_V3, [*PLAIN.values(), SYSTEM, EDGES, ONE_TOOL, TWO_CALLS]),
    "joined": ("llama3", JOINED, [*PLAIN.values(), SYSTEM, ONE_TOOL]),
}


@pytest.fixture(scope="module")
def loaded(assets, own, hugging_face, tmp_path_factory):
    """kind -> template, tokenizer, and the reference's encoding of a conversation with the same template."""
    made = {}

    def load(kind, folder=None, template=None):
        folder, template, _ = CASES.get(kind, (folder, template, []))
        source = assets / "tokenizers" / folder
        tokenizer, theirs = own(folder), hugging_face(folder)
        if kind not in made:
            choice = None
            if template is not None:
                choice = tmp_path_factory.mktemp("template") / "mine.jinja"
                choice.write_text(template)
            made[kind] = load_chat_template(source, tokenizer, choice and str(choice))
        return made[kind], tokenizer, partial(reference, theirs, template)

    return load


def reference(theirs, template, conversation, prompt=False, **options):
    messages, tools = for_transformers(conversation)
    options = {"chat_template": template, "tools": tools, "add_generation_prompt": prompt, **options}
    return theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


@pytest.mark.parametrize("kind", CASES)
def test_ids_are_those_of_transformers(loaded, kind):
    template, _, theirs = loaded(kind)
    conversations = CASES[kind][2]
    for prompt in (False, True):
        rendered = template.encode_batch(conversations, add_generation_prompt=prompt)
        for conversation, ours in zip(conversations, rendered, strict=True):
            assert ours.ids == theirs(conversation, prompt)["input_ids"], conversation
            assert len(ours.targets) == len(ours.ids)
            assert ours == template.encode(conversation, add_generation_prompt=prompt)


def test_targets_are_those_of_generation_blocks(loaded):
    """transformers' mask, where the block holds the token that ends the turn; where it does not, that token is added."""
    template, _, theirs = loaded("generation")
    without_end, _, _ = loaded("generation without end")
    for conversation in (SINGLE, MULTI, SYSTEM, EDGES, QUESTION):
        ours = template.encode(conversation)
        assert [int(t) for t in ours.targets] == theirs(conversation, return_assistant_tokens_mask=True)[
            "assistant_masks"
        ]
        assert without_end.encode(conversation) == ours


def test_targets_without_generation_blocks_are_the_same(loaded, assets):
    """The template of the assets has none: what its turns begin with comes from rendering their beginnings."""
    template, tokenizer, _ = loaded("llama3.1")
    built_in = load_chat_template(assets / "tokenizers" / "llama3", tokenizer, "llama3.1")
    for conversation in (*PLAIN.values(), SYSTEM, ONE_TOOL):
        assert template.encode(conversation) == built_in.encode(conversation)


GOLDEN = {
    "mistral v1": "<s> [INST] a [/INST] bad</s> [INST] b [/INST]⟦good</s>⟧",
    "mistral v3": "<s>[INST] a[/INST] bad</s>[INST] b[/INST]⟦ good</s>⟧",
    "plain text": "### Instruction:\na\n\n### Response:\nbad<|eot_id|>\n\n"
    "### Instruction:\nb\n\n### Response:\n⟦good<|eot_id|>⟧\n\n",
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_targets_are_the_assistants_words_and_the_token_that_ends_them(loaded, kind):
    template, tokenizer, _ = loaded(kind)
    assert marked(tokenizer, template.encode(UNTRAINED)) == GOLDEN[kind]


def test_a_tool_call_is_a_target_from_its_control_token_on(loaded):
    template, tokenizer, _ = loaded("mistral v3")
    text = marked(tokenizer, template.encode(TWO_CALLS))
    assert '⟦[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "aaaaaaaa1"}, {"name"' in text.replace(
        "[TOOL_CALLS] ", "[TOOL_CALLS]"
    )
    assert text.count("⟦") == 2 and '"aaaaaaaa2"}]</s>⟧[TOOL_RESULTS]' in text


def test_a_template_that_changes_contents_is_followed_or_refused(loaded):
    template, tokenizer, theirs = loaded("transforming", "llama3", TRANSFORMING)
    thinking = said(("user", "what  now"), ("assistant", "<think>hm</think>\n\nthis"))
    for prompt in (False, True):
        assert template.encode(thinking, add_generation_prompt=prompt).ids == theirs(thinking, prompt)["input_ids"]
    assert marked(tokenizer, template.encode(thinking)).endswith("<|end_header_id|>\n\n⟦THIS<|eot_id|>⟧")
    # cut in two so that the template itself would put a control token together
    for evil in ("<|eot_</think><|eot_id|>", "<|eot_ID|>".swapcase() + "<|eot_id|>", "<|start_header_id|>"):
        with pytest.raises(LlmtuneDataError, match="it changes contents, and one of them spells"):
            template.encode(said(("user", evil)))
    glue, tokenizer, _ = loaded("glue", "llama3", "{{ messages[0].content | replace('-', '') }}")
    with pytest.raises(LlmtuneDataError, match="other control tokens for these contents"):
        glue.encode(said(("user", "<|eot-_id|>")))
    unclear, _, _ = loaded("unclear", "llama3", "{{ messages[0].content | upper }}{{ messages[1].content | upper }}")
    with pytest.raises(LlmtuneDataError, match=r"put \{% generation %\} around"):
        unclear.encode(said(("user", "a b"), ("assistant", "c")))


def test_what_the_template_refuses_is_one_line_and_the_others_are_rendered(loaded):
    template, _, _ = loaded("mistral v1")
    two = said(("user", "a"), ("user", "b"))
    first, refused, second = template.encode_batch([SINGLE, two, MULTI])
    assert first == template.encode(SINGLE) and second == template.encode(MULTI)
    assert isinstance(refused, LlmtuneDataError) and "roles must alternate" in str(refused)
    with pytest.raises(LlmtuneDataError, match="roles must alternate"):
        template.encode(two)
    deep = current = {}
    for _ in range(100_000):
        current["x"] = current = {}
    for conversation, why in [
        (said(("user", "ab\ud83dc")), "lone surrogate"),
        (said(("user", "a"), call("f", {"x": object()}, "abcdefgh1")), "no JSON"),
        (said(("user", "a"), call("f", deep, "abcdefgh1")), "nested too deeply"),
    ]:
        with pytest.raises(LlmtuneDataError, match=why):
            template.encode(conversation)
    assert template.encode(SINGLE) == first


def test_other_peoples_names_and_a_templates_other_inputs(loaded):
    """`name` of a message reaches the template, as do the special tokens by name."""
    template, tokenizer, _ = loaded(
        "names", "mistral_v1", "{{ unk_token }}{% for m in messages %}{{ m.name }}:{{ m.content }}{% endfor %}"
    )
    ids = template.encode(said(Message("user", "x</s>", name="Ann</s>"))).ids
    assert ids[0] == tokenizer.controls["<unk>"] and tokenizer.decode(ids) == "Ann</s>:x</s>"
    assert not set(ids[1:]) & set(tokenizer.controls.values())


def model(assets, directory, **settings):
    source = assets / "tokenizers" / "mistral_v3"
    shutil.copy(source / "tokenizer.json", directory)
    own = json.loads((source / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(own | settings))
    return load_tokenizer(directory)


def test_whose_template_is_taken(assets, tmp_path):
    tokenizer = model(assets, tmp_path)
    assert load_chat_template(tmp_path, tokenizer).name == "mistral-v3"
    model(assets, tmp_path, chat_template="settings")
    assert load_chat_template(tmp_path, tokenizer).name == "tokenizer_config.json"
    (tmp_path / "chat_template.jinja").write_text("file")
    own = load_chat_template(tmp_path, tokenizer)
    assert own.name == "chat_template.jinja" and tokenizer.decode(own.encode(SINGLE).ids) == "file"
    assert load_chat_template(tmp_path, tokenizer, "mistral-v3").name == "mistral-v3"


def test_a_template_for_tools_beside_the_default(assets, tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = model(assets, tmp_path, chat_template=named)
    template = load_chat_template(tmp_path, tokenizer)
    rendered = template.encode_batch([SINGLE, ONE_TOOL, MULTI])
    assert [tokenizer.decode(r.ids) for r in rendered] == ["plain", "tools", "plain"]
    assert template.encode(ONE_TOOL) == rendered[1]


@pytest.mark.parametrize(
    "given, why",
    [
        ("{{ x", "unexpected end of template"),
        ("{% nonsense %}", "unknown tag"),
        (5, "must be a text"),
        ([{"name": "x", "template": "y"}], "with a default"),
        ([{"name": "default", "template": 5}], "must be a text"),
    ],
)
def test_a_template_that_is_none_is_one_line(assets, tmp_path, given, why):
    tokenizer = model(assets, tmp_path, chat_template=given)
    with pytest.raises(LlmtuneFormatError, match=why) as caught:
        load_chat_template(tmp_path, tokenizer)
    assert len(str(caught.value).splitlines()) == 1


def test_a_template_file_that_is_no_text_is_one_line(assets, tmp_path):
    tokenizer = model(assets, tmp_path)
    (tmp_path / "mine.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LlmtuneFormatError, match="not a text file in UTF-8"):
        load_chat_template(tmp_path, tokenizer, str(tmp_path / "mine.jinja"))
