"""The data of a run: real files as they are, several sources with an account of each, and the look at the first row."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from llmtune import pretrained
from llmtune.config.file import build_run
from llmtune.data import BatchSource, load_data
from llmtune.data.example import IGNORED
from llmtune.errors import LlmtuneConfigError, LlmtuneDataError

CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}Question: {{ message.content }}\nAnswer:{% endif %}{% endfor %}"
)


@pytest.fixture
def load(stories):
    def load(train, home=None, vocab_size=None, **options):
        source = pretrained.open_source(str(stories))
        config = dataclasses.replace(source.config, vocab_size=vocab_size or source.config.vocab_size)
        train = train if isinstance(train, list) else str(train)
        data = {"train": train, "sequence_length": 512, **options}
        return load_data(build_run({"model": "m", "output": "o", "data": data}, "run.yaml"), config, home or stories)

    return load


REAL = [  # file, options, format, rows
    ("lf_alpaca_en_demo.json", {}, "alpaca", 999),
    ("lf_identity.json", {}, "alpaca", 91),
    ("lf_c4_demo.jsonl", {}, "text", 300),
    ("lf_glaive_toolcall_en_demo.json", {}, "sharegpt", 300),
    ("lf_kto_en_demo.json", {}, "messages", 300),
    ("lf_dpo_en_demo.json", {"columns": {"completion": "chosen"}}, "sharegpt", 300),
    ("alpaca_seed_tasks.jsonl", {"columns": {"input": "instances.0.input", "output": "instances.0.output"}}, "alpaca", 175),
    ("gsm8k_test.jsonl", {"columns": {"prompt": "question", "completion": "answer"}}, "prompt_completion", 1319),
    ("gsm8k_test.jsonl", {"columns": {"instruction": "question", "response": "answer"}}, "dolly", 1319),
    ("hh_rlhf_harmless_test_1000.jsonl", {"columns": {"text": "chosen"}}, "text", 1000),
    ("TruthfulQA.csv", {"columns": {"prompt": "Question", "completion": "Best Answer"}}, "prompt_completion", 817),
    ("HumanEval.jsonl.gz", {"columns": {"completion": "canonical_solution"}}, "prompt_completion", 164),
    ("tinyshakespeare.txt", {}, "text", 2),
]  # fmt: skip


@pytest.mark.parametrize("name, options, format, rows", REAL)
def test_real_files_are_read_as_they_are(load, assets, name, options, format, rows):
    llama = {"home": assets / "tokenizers" / "llama3", "vocab_size": 128_256, "chat_template": "llama3.1"}
    chosen = llama if "toolcall" in name else {"chat_template": "mistral-v1"}  # which has no tools
    data = load(assets / "data" / name, sequence_length=2048, **chosen, **options)
    (report,) = data.sources
    content = (assets / "data" / name).read_bytes()
    assert (report.format, report.counts.rows, report.skipped) == (format, rows, {})
    assert (report.files[0].sha256, report.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert report.counts.dropped < 0.15 * rows
    assert data.notes[0].startswith(f"data.train: {format} (detected by ")
    assert (report.template is None) == (format in ("text", "prompt_completion"))
    for index in range(0, len(data.train), 50):  # text may be a later piece of a row
        ids, labels = data.train.example(index)
        assert format == "text" or (list(ids).count(data.tokenizer.bos_id) == 1 and ids[0] == data.tokenizer.bos_id)
        assert np.count_nonzero(labels[1:] != IGNORED) and len(ids) <= 2048


@pytest.mark.parametrize("columns, said", [
    ({}, "a row of preferences: data.columns {completion: chosen}"),
    ({"completion": "chosen.wrong"}, "the row has no target token"),
])  # fmt: skip
def test_a_file_of_preferences_says_how_to_train_on_it(load, assets, columns, said):
    path = assets / "data" / "lf_dpo_en_demo.json"
    with pytest.raises(LlmtuneDataError) as caught:
        load(path, chat_template="mistral-v1", columns=columns)
    assert str(caught.value).startswith(f"{path}: row 1: {said}")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def two(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"prompt": "a", "completion": f"b{n}"} for n in range(40)])
    other = write(tmp_path / "other.jsonl", [{"question": "a", "answer": f"c{n}"} for n in range(10)])
    columns = {"prompt": "question", "completion": "answer"}
    return [{"path": one, "weight": 0.5}, {"path": other, "columns": columns, "format": "prompt_completion"}]


def test_every_source_has_its_account(load, two):
    data = load(two)
    assert [(own.path, own.weight, own.counts.rows) for own in data.sources] == [
        (two[0]["path"], 0.5, 40), (two[1]["path"], 1.0, 10)
    ]  # fmt: skip
    assert sum(own.counts.tokens for own in data.sources) == data.train.counts.tokens == len(data.train.input_ids)
    assert data.notes[0].startswith(
        f"data.train {two[0]['path']}: prompt_completion (detected by prompt and completion), weight 0.5, "
    )
    assert data.notes[1].startswith(f"data.train {two[1]['path']}: prompt_completion (as configured), 10 rows")
    assert load(two).digest == data.digest != load(two[:1]).digest != load(two[::-1]).digest


def test_an_epoch_has_of_each_source_what_its_weight_says_and_can_be_resumed(load, two):
    data = load(two, packing=False)
    source = BatchSource(data.train, 5, 512, 7, False, True, 100)
    assert source.rows_in(1) == 20 + 10 and source.rows_in(4) == 120
    again = BatchSource(load(two, packing=False).train, 5, 512, 7, False, True, 100)
    for step in (17, 3, 6):
        assert all(np.array_equal(again[step][name], source[step][name]) for name in source[step])
    seen = [hash(row.tobytes()) for step in range(12) for row in source[step]["tokens"]]
    assert len(set(seen[:30])) == 30 and len(set(seen)) == 50  # two epochs: each of the first source once


def test_validation_takes_sources_without_weights(load, two):
    plain = [{**two[0], "weight": 1}, two[1]]
    data = load(two, validation=plain)
    assert [own.key for own in data.sources] == ["data.train"] * 2 + ["data.validation"] * 2
    assert data.validation.counts.rows == 50
    with pytest.raises(LlmtuneConfigError, match=r"data.validation: weights belong to training data"):
        load(two, validation=two)


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT)
    return path


def chats(path):
    turns = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "yes"}] for n in range(3)]
    return write(path, [{"messages": own} for own in turns])


def test_the_first_row_is_shown_with_its_targets(load, tmp_path, template):
    data = load(chats(tmp_path / "chats.jsonl"), chat_template=str(template))
    assert data.look.text == "<s>Question: 0\\nAnswer:[[ yes</s>]]" and data.look.warnings == ()
    assert data.look.lines == (f"first row, targets in [[ ]]: {data.look.text}",)
    assert data.tokenizer.decode(data.prompt_ids("0")) == "Question: 0\nAnswer:"
    assert data.end_ids[0] == data.tokenizer.eos_ids[0]


@pytest.mark.parametrize(
    "change, said",
    [
        (("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"), "begins with BOS twice"),
        (("{{ bos_token }}", ""), "does not begin with BOS"),
        (("{{ eos_token }}", ""), "no target of the first 3 rows is an end-of-text token"),
        (("Question: ", "<|im_start|>user\n"), "writes <|im_start|>, which this tokenizer reads as plain text"),
    ],
)
def test_what_is_odd_about_a_template_is_said(load, tmp_path, template, change, said):
    template.write_text(CHAT.replace(*change))
    data = load(chats(tmp_path / "chats.jsonl"), chat_template=str(template))
    assert len(data.look.warnings) == 1 and said in data.look.warnings[0]


def test_a_prompt_in_other_tokens_than_the_rows_is_said(load, tmp_path, template):
    template.write_text(CHAT.replace("Answer:", "Answer: ").replace("%} {{", "%}{{"))
    (warning,) = load(chats(tmp_path / "chats.jsonl"), chat_template=str(template)).look.warnings
    assert "asked in other tokens than it learns from (a blank or line break at the end" in warning


def test_an_end_of_turn_that_the_model_does_not_know_is_said(load, tmp_path, assets):
    home = assets / "tokenizers" / "mistral_v3"
    data = load(chats(tmp_path / "chats.jsonl"), home, 32_768)
    assert data.look.warnings == () and data.template.name == "mistral-v3"
    assert data.look.text == "<s>[INST]0[/INST][[yes</s>]]"


def test_a_long_first_row_is_shortened_in_the_middle(load, tmp_path):
    data = load(write(tmp_path / "rows.jsonl", [{"text": "ab\n" * 4000}]), sequence_length=8192)
    assert len(data.look.text) < 1300 and "characters)..." in data.look.text
    assert data.look.text.startswith("<s>[[ab\\nab") or data.look.text.startswith("<s>[[")


def test_prompts_of_plain_instructions_are_rendered_like_the_rows(load, tmp_path):
    data = load(write(tmp_path / "rows.jsonl", [{"instruction": "Add.", "output": "5"}]))
    assert data.template is None
    assert data.tokenizer.decode(data.prompt_ids("Add.")).endswith("### Instruction:\nAdd.\n\n### Response:")


def test_a_template_that_does_not_exist_is_named(load, tmp_path):
    with pytest.raises(LlmtuneConfigError, match="chat template nothing"):
        load(chats(tmp_path / "chats.jsonl"), chat_template="nothing")


def test_prompts_and_completions_of_turns_are_conversations_too(load, tmp_path):
    """Else samples would be asked in plain text, and nobody would look at the template."""
    (tmp_path / "own.jinja").write_text(CHAT)
    turns = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    (tmp_path / "turns.jsonl").write_text(json.dumps(turns) + "\n")
    data = load(tmp_path / "turns.jsonl", chat_template=str(tmp_path / "own.jinja"))
    assert data.template is not None and data.sources[0].format == "prompt_completion"
    assert f"chat template {tmp_path / 'own.jinja'}" in data.notes[0]
    assert data.look.text.startswith("<s>Question: Hi\\nAnswer:[[ Hello</s>]]")
    ids, labels = data.train.example(0)
    assert data.prompt_ids("Hi") == ids[labels == IGNORED].tolist()


def test_prompts_are_asked_as_training_rows_are_whatever_validation_looks_like(load, tmp_path):
    (tmp_path / "own.jinja").write_text(CHAT)
    rows = {"plain": {"prompt": "a", "completion": " b"}, "chat": {"instruction": "Hi", "output": "Hello"}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    for template in (None, str(tmp_path / "own.jinja")):
        data = load(tmp_path / "plain.jsonl", validation=str(tmp_path / "chat.jsonl"), chat_template=template)
        assert data.template is None and data.plain_prompt("Hi") == "Hi"
    assert data.sources[1].template == template
    assert load(tmp_path / "chat.jsonl").plain_prompt("Hi").startswith("Below is an instruction")
