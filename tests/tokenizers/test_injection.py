"""Text that spells control tokens, role markers, fragments and guesses of placeholders stays text, in every template."""

import random
import secrets

import pytest

from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers import load_chat_template
from llmtune.tokenizers.conversation import Message, ToolCall
from llmtune.tokenizers.masking import Masks
from tests.tokenizers.conversations import TOOLS, said
from tests.tokenizers.templates import GENERATION, JOINED, MISTRAL_V1, MISTRAL_V3, PLAIN_TEXT, TRANSFORMING

MARKERS = [
    "[INST]", "[/INST]", " [INST] ", "<<SYS>>\n",
    "\n<</SYS>>\n\n",
    "<|im_start|>system\n", "<|im_end|>", "user", "assistant", "system",
    "ipython", "\n\n", "### Response:\n", "{{ bos_token }}", "{% generation %}", "{% endgeneration %}", "</think>", "<think>",
    "<|", "|>", "<", ">", "</", "[", "]", "s>", "_id|>", "<|eot", "<|start_header", "[/IN", "ST]", "|", "\\u003c|eot_id|\\u003e",
    "&lt;s&gt;", "\uff1cs\uff1e", "<\u200b|eot_id|>", "\x00", " ", "x", "🙂", '"', "\\", "{", "}", "'", "%s",
    "Today Date: 26 Jul 2024",
]  # fmt: skip
KINDS = {  # kind: tokenizer's folder, template: a built-in's name, Jinja, or None for the published one in the assets
    "llama3": ("llama3", "llama3"),
    "llama3.1": ("llama3", "llama3.1"),
    "llama3.1, jinja": ("llama3", None),
    "mistral-v1": ("mistral_v1", "mistral-v1"),
    "mistral-v3": ("mistral_v3", "mistral-v3"),
    "mistral-tekken": ("tekken", "mistral-tekken"),
    "mistral v1, jinja": ("mistral_v1", MISTRAL_V1),
    "mistral v3, jinja": ("mistral_v3", MISTRAL_V3),
    "mistral v3, jinja, tekken": ("tekken", MISTRAL_V3),
    "generation": ("llama3", GENERATION),
    "plain text": ("llama3", PLAIN_TEXT),
    "joined": ("llama3", JOINED),
    "transforming": ("llama3", TRANSFORMING),
}
COUNT = 2000


def contents(tokenizer, seed):
    """Each glued of one to six parts."""
    draw = random.Random(seed)
    spellings = sorted(tokenizer.controls)
    usual = [s for s in spellings if "reserved" not in s and "SPECIAL" not in s and "control" not in s]
    masks = Masks(())
    guesses = [masks.of_message(0)("x"), masks.prefix, f"q{secrets.token_hex(16)}x0z", f"q{'0' * 32}x0z", "x0z", "x1z"]

    def part():
        kind = draw.randrange(6)
        if kind < 2:
            return draw.choice(usual)
        if kind == 2:
            return draw.choice(spellings)
        if kind == 3:
            spelling = draw.choice(usual)
            cut = draw.randrange(len(spelling) + 1)
            return draw.choice((spelling[:cut], spelling[cut:]))
        return draw.choice(guesses if kind == 4 and draw.random() < 0.3 else MARKERS)

    return ["".join(part() for _ in range(draw.randint(1, 6))) or "x" for _ in range(COUNT)]


def conversation(texts, tools):
    """Five of the contents, in every place that a conversation has for them."""
    first, second, third, fourth, fifth = texts
    turns = [("user", first), Message("assistant", second, train=True), ("user", third)]
    if tools:
        turns.append(Message("assistant", "", (ToolCall("f" + fourth, {fifth: fourth, "x": [fifth]}, "abcdefgh1"),)))
        turns.append(Message("tool", fifth, tool_call_id="abcdefgh1"))
        tool = {"type": "function", "function": {**TOOLS[0]["function"], "description": first, "name": second}}
        return said(*turns, ("assistant", fourth), tools=[tool])
    return said(*turns, ("assistant", fourth))


@pytest.mark.parametrize("kind", KINDS)
def test_no_control_token_comes_out_of_contents(assets, own, tmp_path, kind):
    """The control tokens are, in kind and number, those of the same conversation with harmless contents."""
    folder, template = KINDS[kind]
    source = assets / "tokenizers" / folder
    tokenizer = own(folder)
    if template is not None and "{" in template:
        (tmp_path / "mine.jinja").write_text(template)
        template = str(tmp_path / "mine.jinja")
    chat = load_chat_template(source, tokenizer, template)
    known = set(tokenizer.controls.values())
    texts = contents(tokenizer, seed=KINDS[kind][0] + kind)
    tools = kind in ("llama3.1", "llama3.1, jinja", "mistral-v3", "mistral-tekken", "joined")
    if (
        kind == "transforming"
    ):  # it refuses what spells control tokens; fragments, which it might put together, it takes
        spelling = [text for text in texts if any(name in text for name in tokenizer.controls)]
        assert all(
            isinstance(one, LlmtuneDataError) for one in chat.encode_batch([said(("user", t)) for t in spelling])
        )
        texts = [text for text in texts if text not in spelling]
    evil = [conversation(texts[i : i + 5], tools) for i in range(0, len(texts) - 4, 5)]
    expected = [i for i in chat.encode(conversation(["a"] * 5, tools)).ids if i in known]
    for rendered in chat.encode_batch(evil):
        assert not isinstance(rendered, LlmtuneDataError), rendered
        assert [i for i in rendered.ids if i in known] == expected
        assert len(rendered.ids) == len(rendered.targets) and any(rendered.targets)


def test_the_check_sees_a_template_without_the_separation(own):
    """What the same contents give where the whole rendering may spell control tokens."""
    tokenizer = own("llama3")
    known = set(tokenizer.controls.values())
    found = [
        i
        for text in contents(tokenizer, seed="x")
        for i in tokenizer.encode(text, bos=False, allow_special=True)
        if i in known
    ]
    assert len(found) > COUNT / 2


def test_contents_that_spell_control_tokens_give_the_ids_of_plain_text(assets, own):
    """Beyond having no control tokens: the template's are in place, and the text comes back."""
    source = assets / "tokenizers" / "llama3"
    tokenizer = own("llama3")
    published, built_in = (load_chat_template(source, tokenizer, choice) for choice in (None, "llama3.1"))
    for text in contents(tokenizer, seed="text")[:300]:
        talk = said(("user", text), ("assistant", f"I say {text} again."))
        rendered = published.encode(talk)
        assert rendered == built_in.encode(talk), repr(text)
        spoken = [i for i, target in zip(rendered.ids, rendered.targets, strict=True) if target]
        assert tokenizer.decode(spoken) == f"I say {text} again."
