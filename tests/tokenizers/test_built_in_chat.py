"""Built-in chat templates: the ids of transformers and of mistral-common, and golden tables of what is a target."""

import itertools
import shutil

import pytest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from llmtune.errors import LlmtuneConfigError, LlmtuneDataError
from llmtune.tokenizers import load_chat_template, load_tokenizer, write_chat_template
from llmtune.tokenizers.conversation import Message, ToolCall
from tests.tokenizers.conversations import (
    MULTI,
    ONE_TOOL,
    PLAIN,
    QUESTION,
    SINGLE,
    SYSTEM,
    TOOLS,
    TWO_CALLS,
    UNTRAINED,
    call,
    for_mistral_common,
    for_transformers,
    said,
)
from tests.tokenizers.marking import marked

FILES = {
    "mistral-v1": ["mistral_v1/tokenizer.json", "mistral_v1/tokenizer.model"],
    "mistral-v3": ["mistral_v3/tokenizer.json", "mistral_v3/tokenizer.model.v3"],
    "mistral-tekken": ["tekken/tekken.json"],
}
LLAMA = ["llama3", "llama3.1", "llama3.2"]
WITH_TOOLS = [
    ONE_TOOL,
    said(("user", "q"), call("now", {}), Message("tool", "12:00"), ("assistant", "noon"), tools=TOOLS),
]


@pytest.fixture(scope="module")
def built(assets, tmp_path_factory):
    """name, file -> template, tokenizer; read from a directory that holds the file and its settings alone."""
    tokenizers, made = {}, {}

    def build(name, file):
        source = assets / "tokenizers" / file
        if file not in tokenizers:
            directory = tmp_path_factory.mktemp("chat")
            shutil.copy(source, directory)
            if (source.parent / "tokenizer_config.json").is_file():
                shutil.copy(source.parent / "tokenizer_config.json", directory)
            tokenizers[file] = load_tokenizer(directory)
        if (name, file) not in made:
            made[name, file] = load_chat_template(source.parent, tokenizers[file], name)
        return made[name, file], tokenizers[file]

    return build


def reference(theirs, name, conversation, prompt):
    """Llama 3's first template is told here in Jinja; the later ones are the published one that stands in the assets."""
    first = (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
        "m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    messages, tools = for_transformers(conversation)
    return theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=False,
        chat_template=first if name == "llama3" else None,
    )  # fmt: skip


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("file", ["llama3/tokenizer.json", "llama3/tokenizer.model"])
@pytest.mark.parametrize("name", LLAMA)
def test_llamas_ids_are_those_of_transformers(built, hugging_face, name, file, prompt):
    template, _ = built(name, file)
    assert template.name == name
    for conversation in [*PLAIN.values(), SYSTEM, *(WITH_TOOLS if name != "llama3" else [])]:
        rendered = template.encode(conversation, add_generation_prompt=prompt)
        assert rendered.ids == reference(hugging_face("llama3"), name, conversation, prompt)
        assert len(rendered.targets) == len(rendered.ids)


@pytest.mark.parametrize("name, file", [(name, file) for name, files in FILES.items() for file in files])
def test_mistrals_ids_are_those_of_mistral_common(built, assets, name, file):
    template, _ = built(name, file)
    theirs = MistralTokenizer.from_file(str(assets / "tokenizers" / FILES[name][-1]), mode=ValidationMode.agnostic)
    for conversation in [*PLAIN.values(), SYSTEM, *([ONE_TOOL, TWO_CALLS] if name != "mistral-v1" else [])]:
        expected = theirs.encode_chat_completion(for_mistral_common(conversation)).tokens
        for prompt in (False, True):
            assert template.encode(conversation, add_generation_prompt=prompt).ids == expected


DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


GOLDEN = {
    "llama3": f"<|begin_of_text|>{header('user')}a<|eot_id|>{header('assistant')}bad<|eot_id|>{header('user')}b<|eot_id|>"
    f"{header('assistant')}⟦good<|eot_id|>⟧",
    "llama3.1": f"<|begin_of_text|>{header('system')}{DATES}<|eot_id|>{header('user')}a<|eot_id|>{header('assistant')}bad"
    f"<|eot_id|>{header('user')}b<|eot_id|>{header('assistant')}⟦good<|eot_id|>⟧",
    "mistral-v1": "<s>[INST] a [/INST] bad</s>[INST] b [/INST]⟦good</s>⟧",
    "mistral-v3": "<s>[INST]a[/INST]bad</s>[INST]b[/INST]⟦good</s>⟧",
}
GOLDEN["llama3.2"], GOLDEN["mistral-tekken"] = GOLDEN["llama3.1"], GOLDEN["mistral-v3"]
GOLDEN_MULTI = {
    "llama3": f"<|begin_of_text|>{header('user')}Hi there<|eot_id|>{header('assistant')}⟦Hello!\n\nHow can I help?<|eot_id|>⟧"
    f"{header('user')}日本語 🙂\n\n\tcode: `x`<|eot_id|>{header('assistant')}⟦はい。<|eot_id|>⟧"
    f'{header("user")}1234567 ... "quoted" \\n<|eot_id|>{header("assistant")}⟦ok<|eot_id|>⟧',
    "mistral-tekken": "<s>[INST] Hi there \n[/INST]⟦Hello!\n\nHow can I help?</s>⟧"
    "[INST]日本語 🙂\n\n\tcode: `x`[/INST]⟦はい。</s>⟧"
    '[INST]1234567 ... "quoted" \\n[/INST]⟦\tok</s>⟧',
}


@pytest.mark.parametrize("name", GOLDEN)
def test_targets_are_the_assistants_words_and_the_token_that_ends_them(built, name):
    for file in ["llama3/tokenizer.json", "llama3/tokenizer.model"] if name in LLAMA else FILES[name]:
        template, tokenizer = built(name, file)
        assert marked(tokenizer, template.encode(UNTRAINED)) == GOLDEN[name]
        if name in GOLDEN_MULTI:
            assert marked(tokenizer, template.encode(MULTI)) == GOLDEN_MULTI[name]
        asked = template.encode(QUESTION, add_generation_prompt=True)
        assert not any(asked.targets)
        assert template.encode(said(*QUESTION.messages, ("assistant", "I"))).ids[: len(asked.ids)] == asked.ids
        assert asked.ids.count(tokenizer.bos_id) == 1 and asked.ids[0] == tokenizer.bos_id


def test_a_golden_table_token_by_token(built):
    """What a reader can check by eye: id, spelling, target."""
    rendered = built("llama3", "llama3/tokenizer.json")[0].encode(SINGLE)
    assert list(zip(rendered.ids, rendered.targets, strict=True)) == [
        (128000, False),  # <|begin_of_text|>
        (128006, False), (882, False), (128007, False), (271, False),  # header: user
        (3923, False), (374, False), (220, False), (17, False), (10, False), (17, False), (30, False),  # What is 2+2?
        (128009, False),  # <|eot_id|>
        (128006, False), (78191, False), (128007, False), (271, False),  # header: assistant
        (19, True), (128009, True),  # 4 <|eot_id|>
    ]  # fmt: skip


def test_tool_calls_are_targets_and_results_are_not(built):
    spelled = '{"name": "get_weather", "parameters": {"city": "Zürich", "n": [1, 2.5, null, true, {"é": "ü\\n"}]}}'
    template, tokenizer = built("llama3.1", "llama3/tokenizer.json")
    text = marked(tokenizer, template.encode(ONE_TOOL))
    assert f'{header("assistant")}⟦{spelled}<|eot_id|>⟧{header("ipython")}"{{\\"temperature' in text
    assert text.count("⟦") == 4
    template, tokenizer = built("mistral-v3", "mistral_v3/tokenizer.json")
    text = marked(tokenizer, template.encode(TWO_CALLS))
    calls = (
        '[{"name": "now", "arguments": {}, "id": "aaaaaaaa1"}, '
        '{"name": "get_weather", "arguments": {"city": "Rom"}, "id": "aaaaaaaa2"}]'
    )
    assert f"[/INST]⟦[TOOL_CALLS]{calls}</s>⟧[TOOL_RESULTS]" in text
    assert text.endswith(
        '[TOOL_RESULTS]{"content": "warm, \\"really\\"", "call_id": "aaaaaaaa2"}[/TOOL_RESULTS]⟦Noon, warm.</s>⟧'
    )


def test_ids_of_calls_that_mistral_does_not_take_become_some_that_it_takes(built):
    template, tokenizer = built("mistral-v3", "mistral_v3/tokenizer.json")
    answer = Message("tool", "noon", tool_call_id="call_5Yx-1")
    text = marked(tokenizer, template.encode(said(("user", "q"), call("now", {}, "call_5Yx-1"), answer, tools=TOOLS)))
    made = text.split('"id": "')[1][:9]
    assert made.isalnum() and f'"call_id": "{made}"' in text
    without = said(("user", "q"), call("now", {}), Message("tool", "noon"), ("assistant", "ok"), tools=TOOLS)
    text = marked(tokenizer, template.encode(without))
    assert f'"call_id": "{text.split(chr(34) + "id" + chr(34) + ": " + chr(34))[1][:9]}"' in text


REFUSED = {
    "no messages": said(),
    "first turn": said(("assistant", "I begin")),
    "alternate": said(("user", "a"), ("user", "b")),
    "cannot follow": said(("user", "a"), ("assistant", "b"), ("system", "c")),
    "no result": said(("user", "a"), call("now", {}), ("assistant", "c"), tools=TOOLS),
    "answers no call": said(("user", "a"), ("assistant", "b"), Message("tool", "c"), tools=TOOLS),
    "neither text nor": said(("user", "a"), ("assistant", "")),
    "this one has both": said(("user", "a"), Message("assistant", "b", (ToolCall("now", {}),)), tools=TOOLS),
    "no JSON": said(("user", "a"), call("now", {"x": object()}), tools=TOOLS),
}
REFUSED_BY = {
    "mistral-v3": REFUSED.keys() - {"no messages"},
    "mistral-v1": {"first turn", "alternate", "cannot follow", "neither text nor"},
    "llama3.1": {"no messages", "this one has both", "no JSON"},
    "llama3": {"no messages"},
}


@pytest.mark.parametrize("name", REFUSED_BY)
def test_what_a_template_cannot_express_is_one_line(built, name):
    template, _ = built(name, FILES.get(name, ["llama3/tokenizer.json"])[0])
    for why in REFUSED_BY[name]:
        with pytest.raises(LlmtuneDataError, match=why) as caught:
            template.encode(REFUSED[why])
        assert len(str(caught.value).splitlines()) == 1 and name in str(caught.value)
    for conversation, why in [(ONE_TOOL, "it has no tools"), (said(("user", "q"), call("now", {})), "it has no tool")]:
        if name in ("mistral-v1", "llama3"):
            with pytest.raises(LlmtuneDataError, match=why):
                template.encode(conversation)
    with pytest.raises(LlmtuneDataError, match="lone surrogate"):
        template.encode(said(("user", "ab\ud83dc")))


def test_llama_takes_one_call_a_turn(built):
    with pytest.raises(LlmtuneDataError, match="one tool call a turn, not 2"):
        built("llama3.1", "llama3/tokenizer.json")[0].encode(TWO_CALLS)
    with pytest.raises(LlmtuneDataError, match="tools are told in the first user turn"):
        built("llama3.1", "llama3/tokenizer.json")[0].encode(said(("system", "s"), tools=TOOLS))


def test_a_batch_is_what_its_conversations_are_with_errors_in_their_place(built):
    template, _ = built("llama3", "llama3/tokenizer.json")
    first, second, third = template.encode_batch([SINGLE, REFUSED["no messages"], MULTI])
    assert (first, third) == (template.encode(SINGLE), template.encode(MULTI))
    assert isinstance(second, LlmtuneDataError)


@pytest.mark.parametrize(
    "name, expected",
    [("llama3", "llama3.1"), ("mistral_v1", None), ("mistral_v3", "mistral-v3"), ("tekken", "mistral-tekken")],
)
def test_without_a_template_of_its_own_the_vocabulary_tells(assets, tmp_path, name, expected):
    for file in (assets / "tokenizers" / name).glob("tok*.model*" if name == "mistral_v3" else "t*[nl]"):
        if file.name != "tokenizer_config.json":
            shutil.copy(file, tmp_path)
    template = load_chat_template(tmp_path, load_tokenizer(tmp_path))
    assert (template and template.name) == expected


def test_a_choice_that_does_not_fit_is_one_line(assets, tmp_path):
    directory = assets / "tokenizers" / "mistral_v1"
    tokenizer = load_tokenizer(directory)
    for choice, why in [
        ("llama3", "has no <|begin_of_text|>"),
        ("mistral-v3", r"has no \[INST\]"),
        ("llama4", "neither a built-in one"),
        (str(tmp_path / "none.jinja"), "neither a built-in one"),
    ]:
        with pytest.raises(LlmtuneConfigError, match=why) as caught:
            load_chat_template(directory, tokenizer, choice)
        assert len(str(caught.value).splitlines()) == 1


IN_JINJA = [
    ("llama3", "llama3/tokenizer.json"), ("llama3.1", "llama3/tokenizer.json"), ("llama3.2", "llama3/tokenizer.json"),
    *((name, file) for name, files in FILES.items() for file in files),
]  # fmt: skip
TOLD = [*PLAIN.values(), SYSTEM, *WITH_TOOLS, TWO_CALLS, said(("user", "a"), ("user", "b"))]


@pytest.mark.parametrize("name, file", IN_JINJA)
def test_an_export_says_a_built_in_template_in_jinja_with_the_same_ids(built, hugging_face, tmp_path, name, file):
    """To llmtune, which knows its own words again, to llmtune as to any other Jinja, and to transformers."""
    template, tokenizer = built(name, file)
    write_chat_template(tmp_path, template)
    again = load_chat_template(tmp_path, tokenizer)
    assert again.encode(SINGLE) == template.encode(SINGLE) and again.jinja == template.jinja
    assert (again.name, template.name) in ((name, name), ("llama3.1", "llama3.2"), ("mistral-v3", "mistral-tekken"))
    as_jinja = load_chat_template(tmp_path, tokenizer, str(tmp_path / "chat_template.jinja"))
    assert as_jinja.name.endswith("chat_template.jinja")
    folder, read = file.split("/")
    theirs = hugging_face(folder) if read == "tokenizer.json" else None
    for conversation, prompt in itertools.product(TOLD, (False, True)):
        try:
            own = template.encode(conversation, add_generation_prompt=prompt)
        except LlmtuneDataError:
            with pytest.raises(LlmtuneDataError):
                as_jinja.encode(conversation, add_generation_prompt=prompt)
            continue
        messages, tools = for_transformers(conversation)
        calls = [call for message in messages for call in message.get("tool_calls", ())]
        if name.startswith("mistral") and not all("id" in call for call in calls):
            continue  # Jinja cannot make ids up
        if theirs is not None:
            assert own.ids == theirs.apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=False,
                chat_template=template.jinja,
            )  # fmt: skip
        if name.startswith("mistral") and conversation is ONE_TOOL:
            with pytest.raises(LlmtuneDataError, match="it changes contents"):  # a result that is JSON is not quoted
                as_jinja.encode(conversation, add_generation_prompt=prompt)
        else:
            assert as_jinja.encode(conversation, add_generation_prompt=prompt) == own
