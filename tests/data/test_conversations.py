"""The same conversation, whatever format it is written in, gives the same ids and the same targets."""

import json

import pytest

from llmtune.data.example import IGNORED
from llmtune.data.formats import detect_format, instruction_prompt, make_formatter, read_examples
from llmtune.data.rows import Row
from llmtune.errors import LlmtuneDataError
from llmtune.tokenizers import load_chat_template, load_tokenizer
from llmtune.tokenizers.conversation import Conversation, Message
from llmtune.tokenizers.turns import chat_prompt, end_ids

TURNS = [("user", "What is 2 + 2?\nShow it."), ("assistant", "4"), ("user", "And </s> [INST]?"), ("assistant", "Text.")]
OPENAI = [{"role": role, "content": content} for role, content in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": content} for role, content in TURNS]
PARTS = [
    {"role": role, "content": [{"type": "text", "text": content[:3]}, {"type": "text", "text": content[3:]}]}
    for role, content in TURNS
]
SAME = {
    "messages": {"messages": OPENAI},
    "messages in parts": {"messages": PARTS},
    "sharegpt": {"conversations": SHAREGPT},
    "sharegpt in OpenAI's words": {"conversations": OPENAI},
    "alpaca": {
        "instruction": TURNS[2][1], "input": "", "output": TURNS[3][1], "history": [[TURNS[0][1], TURNS[1][1]]]
    },
    "prompt_completion": {"prompt": [*OPENAI[:1], {**OPENAI[1]}, *OPENAI[2:3]], "completion": OPENAI[3:]},
    "preferences": {"conversations": SHAREGPT[:3], "chosen": SHAREGPT[3], "rejected": {"from": "gpt", "value": "No."}},
}  # fmt: skip
SINGLE = {
    "messages": {"messages": [{"role": "user", "content": "Add.\n2 and 3"}, {"role": "assistant", "content": "5"}]},
    "alpaca": {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    "dolly": {"instruction": "Add.", "context": "2 and 3", "response": "5", "category": "sum"},
    "prompt_completion": {"prompt": [{"role": "user", "content": "Add.\n2 and 3"}], "completion": "5"},
}


@pytest.fixture(scope="module", params=["llama3", "mistral_v3", "stories"])
def chat(request, assets):
    """(tokenizer, chat template)"""
    name = request.param
    home = assets / "models" / "stories260K" if name == "stories" else assets / "tokenizers" / name
    tokenizer = load_tokenizer(home)
    return tokenizer, load_chat_template(home, tokenizer, {"stories": "mistral-v1", "llama3": "llama3"}.get(name))


def read(row, chat, name=None, columns=None, pretrain=False):
    columns, given = columns or {}, Row(row, "rows.jsonl:1")
    name = name or detect_format(given, columns)
    formatter = make_formatter(name, chat[0], columns, 200_000, pretrain=pretrain, template=chat[1])
    (example,) = read_examples([given], formatter)
    return example.input_ids.tolist(), example.labels.tolist()


def refusal(row, chat, name=None, columns=None):
    with pytest.raises(LlmtuneDataError) as caught:
        read(row, chat, name, columns)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def expected(chat, turns):
    rendered = chat[1].encode(Conversation(tuple(Message(role, content) for role, content in turns)))
    return rendered.ids, [i if target else IGNORED for i, target in zip(rendered.ids, rendered.targets, strict=True)]


@pytest.mark.parametrize("spelling", SAME)
def test_the_same_conversation_in_every_format_is_the_same_example(chat, spelling):
    ids, labels = read(SAME[spelling], chat, columns={"completion": "chosen"} if spelling == "preferences" else None)
    theirs, targets = expected(chat, TURNS)
    assert ids == theirs
    if spelling == "prompt_completion":  # of which the completion alone is learned
        first = targets.index(IGNORED, targets.index(next(t for t in targets if t != IGNORED)))
        targets = [IGNORED] * first + targets[first:]
    assert labels == targets and labels != [IGNORED] * len(labels)
    tokens = {"input_ids": ids, "labels": labels}
    assert read(tokens, chat) == (ids, labels)


@pytest.mark.parametrize("spelling", SINGLE)
def test_one_exchange_in_every_format_is_the_same_example(chat, spelling):
    assert read(SINGLE[spelling], chat) == expected(chat, [("user", "Add.\n2 and 3"), ("assistant", "5")])


def test_targets_are_what_the_assistant_says_and_the_end_of_its_turns(chat):
    tokenizer, template = chat
    ids, labels = read(SAME["messages"], chat)
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    runs = [[]]
    for label in labels:
        runs[-1].append(label) if label != IGNORED else runs.append([]) if runs[-1] else None
    runs = [run for run in runs if run]
    assert len(runs) == 2 and all(run[-1] == end_ids(tokenizer, template)[0] for run in runs)
    assert [tokenizer.decode(run).strip() for run in runs] == ["4", "Text."]


def test_for_pretraining_everything_is_a_target(chat):
    ids, labels = read(SAME["messages"], chat, pretrain=True)
    assert ids == read(SAME["messages"], chat)[0] and labels[1:] == ids[1:]


def test_a_turn_of_weight_zero_and_an_empty_one_are_no_targets(chat):
    quiet = [OPENAI[0], {**OPENAI[1], "weight": 0}, *OPENAI[2:]]
    ids, labels = read({"messages": quiet}, chat)
    assert ids == expected(chat, TURNS)[0]
    assert chat[0].decode([label for label in labels if label != IGNORED]).strip() == "Text."
    assert refusal({"messages": [OPENAI[0], {**OPENAI[1], "weight": 0}]}, chat).endswith(
        "the row has no target token; remove it, or fill in its completion"
    )


def test_the_system_comes_from_its_turn_or_its_column(chat):
    turn = {"messages": [{"role": "system", "content": "Be brief."}, *OPENAI[:2]]}
    developer = {"messages": [{"role": "developer", "content": "Be brief."}, *OPENAI[:2]]}
    column = {"system": "Be brief.", "conversations": SHAREGPT[:2]}
    alpaca = {"system": "Be brief.", "instruction": TURNS[0][1], "output": TURNS[1][1], "input": None}
    examples = [read(row, chat) for row in (turn, developer, column, alpaca)]
    assert all(example == examples[0] for example in examples)
    assert examples[0] != read({"messages": OPENAI[:2]}, chat)


def test_tool_calls_are_the_same_from_openai_and_sharegpt(assets):
    home = assets / "tokenizers" / "llama3"
    tokenizer = load_tokenizer(home)
    chat = tokenizer, load_chat_template(home, tokenizer, "llama3.1")
    function = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
    call = {"name": "weather", "arguments": {"city": "Bern"}}
    openai = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant", "content": None,
                "tool_calls": [{"id": "a", "type": "function", "function": {**call, "arguments": '{"city": "Bern"}'}}],
            },
            {"role": "tool", "tool_call_id": "a", "content": "5 degrees"},
            {"role": "assistant", "content": "Cold."},
        ],
        "tools": [{"type": "function", "function": function}],
    }  # fmt: skip
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Weather?"}, {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "5 degrees"}, {"from": "gpt", "value": "Cold."},
        ],
        "tools": json.dumps([function]),
    }  # fmt: skip
    assert read(sharegpt, chat) == read(openai, chat)
    said = tokenizer.decode([label for label in read(openai, chat)[1] if label != IGNORED])
    assert '{"name": "weather", "parameters": {"city": "Bern"}}' in said and said.endswith("Cold.")


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": []}, "the column 'messages' holds no turn"),
        ({"messages": "hi"}, "the column 'messages' is str, a list of turns is expected"),
        ({"messages": None}, "the column 'messages' is missing, a list of turns is expected"),
        ({"messages": ["hi"]}, "messages.0 is str, a turn is an object with a role"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0: 'boss' is no role; there are system"),
        ({"messages": [{"content": "x"}]}, "messages.0: None is no role"),
        ({"messages": [OPENAI[0], {"role": "assistant", "content": None}]}, "the content of messages.1 is NoneType"),
        ({"messages": [{"role": "user", "content": 5}]}, "the content of messages.0 is int, a text is expected"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0 has a part of type 'image'"),
        ({"messages": [{"role": "user", "content": "a\0"}]}, "the text holds a NUL"),
        ({"messages": [{**OPENAI[0], "weight": 2}]}, "messages.0.weight is 2"),
        ({"messages": OPENAI, "tools": "{"}, "tools is no JSON"),
        ({"messages": OPENAI, "tools": {"a": 1}}, "tools must be a list of JSON schemas"),
        ({"messages": OPENAI[:1]}, "the row has no target token"),
        ({"conversations": [{"from": "function_call", "value": "weather()"}]}, "conversations.0 is no JSON of a call"),
        ({"conversations": SHAREGPT[:1], "chosen": "x", "rejected": "y"}, "a row of preferences: data.columns"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history must be a list of [question, answer]"),
        ({"instruction": "x", "output": ""}, "the row has no target token"),
        ({"instruction": "x", "output": "y", "input": 5}, "the column 'input' is int"),
    ],
)
def test_a_bad_conversation_is_named_by_file_and_line(chat, row, said):
    assert refusal(row, chat).startswith(f"rows.jsonl:1: {said}")


def test_what_the_template_cannot_express_is_a_bad_row(assets):
    home = assets / "tokenizers" / "llama3"
    tokenizer = load_tokenizer(home)
    row = {"messages": [*OPENAI[:2], {"role": "tool", "content": "x"}]}
    said = refusal(row, (tokenizer, load_chat_template(home, tokenizer, "llama3")))
    assert said.startswith("rows.jsonl:1: chat template llama3: it has no tool calls")


def test_without_a_template_instructions_are_the_published_prompt(stories):
    tokenizer = load_tokenizer(stories)
    head = "Below is an instruction that describes a task"
    tail = "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
    assert instruction_prompt("Add.") == f"{head}. {tail}### Response:"
    prompt = f"{head}, paired with an input that provides further context. {tail}### Input:\n2 and 3\n\n### Response:"
    assert instruction_prompt("Add.", "2 and 3") == prompt
    plain = read({"prompt": prompt, "completion": "5"}, (tokenizer, None))
    assert read(SINGLE["alpaca"], (tokenizer, None)) == plain == read(SINGLE["dolly"], (tokenizer, None))


def test_without_a_template_conversations_are_refused_with_what_to_do(stories):
    chat = load_tokenizer(stories), None
    assert refusal(SAME["messages"], chat).startswith(
        "data.format: messages needs a chat template, and the model has none"
    )
    assert "set data.chat_template" in refusal(SAME["sharegpt"], chat)
    assert "the column 'history' needs a chat template" in refusal(SAME["alpaca"], chat)
    assert "a prompt of turns needs a chat template" in refusal(SAME["prompt_completion"], chat)


def test_a_prompt_ends_where_the_assistant_begins(chat):
    ids, labels = read(SINGLE["messages"], chat)
    prompt = chat_prompt(chat[1], "Add.\n2 and 3")
    assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert labels[len(prompt)] != IGNORED


@pytest.mark.parametrize(
    "row, columns, name",
    [
        ({"instruction": "a", "output": "b", "text": "c"}, {}, "alpaca"),
        ({"instruction": "a", "output": "b", "text": "c"}, {"text": "text"}, "text"),
        ({"messages": [], "prompt": "a", "completion": "b"}, {}, "messages"),
        ({"instruction": "a", "response": "b", "context": ""}, {}, "dolly"),
        ({"q": "a", "a": [{"text": "b"}]}, {"prompt": "q", "completion": "a.0.text"}, "prompt_completion"),
        ({"a.b": "c"}, {"text": "a.b"}, "text"),
    ],
)  # fmt: skip
def test_the_format_is_known_by_the_columns(row, columns, name):
    assert detect_format(Row(row, "rows.jsonl:1"), columns) == name
