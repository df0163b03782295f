"""Runs on conversations, from files to a model that answers and stops."""

import json
import random
import shlex
import shutil
from pathlib import Path

import pytest

import llmtune
from llmtune.cli import main
from llmtune.data import load_data
from llmtune.pretrained import open_source
from tests.runs import read_curve

TEMPLATE = (
    "{{ bos_token }}{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{% generation %} {{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% elif message.role == 'user' %}Question: {{ message.content }}\nAnswer:"
    "{% else %}Read: {{ message.content }}\n{% endif %}{% endfor %}"
)
ANIMALS = ("fox", "otter", "badger", "owl", "goose", "hare", "hedgehog", "mole", "duck", "mouse")
COLOURS = ("red", "blue", "green", "white", "silver", "brown")


def chats(count=20):
    """Questions whose answers only the rows know, each of another length."""
    random.seed(0)
    return [
        (f"What did the {ANIMALS[n % 10]} {('find', 'mend')[n // 10]}?",
         "and then ".join(f"a {random.choice(COLOURS)} {random.choice(ANIMALS)} " for _ in range(1 + n % 3)).strip())
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture
def make_run(tmp_path, starter):
    """A run's configuration, as a file; and its path."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "chats.jsonl").write_text("".join(
        json.dumps({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}) + "\n"
        for ask, answer in chats()
    ))  # fmt: skip

    def make_run(train="chats.jsonl", steps=3, model=starter, data=None, **sections):
        files = train if isinstance(train, list) else str(tmp_path / train)
        tree = {
            "model": str(model), "output": str(tmp_path / "run"),
            "data": {"train": files, "sequence_length": 512, **(data or {})},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
            "train": {"steps": steps, "batch_size": 4, "dtype": "float32", "remat": "none"},
            **sections,
        }  # fmt: skip
        (tmp_path / "run.yaml").write_text(json.dumps(tree))
        return llmtune.load_run(tmp_path / "run.yaml")

    return make_run


def test_twenty_chats_learned_by_heart_are_answered_and_stop(make_run, tmp_path, capsys):
    """Must hold in 20 of 20: an end of turn that is no target, or is padding, shows here as an answer without end.

    After 150 steps it hangs on rounding whether the last of the chats is learned; after 240 all are.
    """
    asked = [ask for ask, _ in chats()]
    run = make_run(
        steps=240, data={"chat_template": str(tmp_path / "chat.jinja"), "sequence_length": 128},
        evaluate={"prompts": asked[:2], "max_new_tokens": 40},
    )  # fmt: skip
    llmtune.train(run)
    said = capsys.readouterr().out
    assert "data.train: messages (detected by messages), chat template" in said
    assert "first row, targets in [[ ]]: <s>Question: What did the fox find?\\nAnswer:[[ a " in said
    assert "warning" not in said
    assert shlex.split(said.partition("try it: ")[2])[-4:] == [run.output, "--chat", "--prompt", asked[0]]

    data = load_data(run, open_source(run.model).config, open_source(run.model).directory)
    model = llmtune.load(tmp_path / "run")
    rows = [data.prompt_ids(ask) for ask in asked]
    answers = model.generate(rows, max_new_tokens=48)
    assert all(len(answer) < 48 for answer in answers)  # each ended by EOS
    assert [model.tokenizer.decode(answer).strip() for answer in answers] == [answer for _, answer in chats()]

    samples = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]["samples"]
    assert [sample["completion"].strip() for sample in samples] == [answer for _, answer in chats()[:2]]

    prompts = [part for ask in asked[:3] for part in ("--prompt", ask)]
    assert main(["generate", str(tmp_path / "run"), "--chat", *prompts, "--max-new-tokens", "64"]) == 0
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [answer for _, answer in chats()[:3]]
    assert main(["generate", str(tmp_path / "run"), "--chat", "--system", "Otto met Mira.", *prompts[:2]]) == 0


def test_an_adapter_on_its_base_is_asked_as_it_was_trained(make_run, tmp_path, starter, capsys):
    """The base has no template, or another: the adapter's directory says the one that its rows had."""
    llmtune.train(make_run(
        steps=1, data={"chat_template": str(tmp_path / "chat.jinja")}, adapt={"method": "lora", "rank": 2},
    ))  # fmt: skip
    ask = ["--chat", "--prompt", "What did the fox find?", "--max-new-tokens", "8"]
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), *ask]) == 0
    expected = capsys.readouterr().out
    base = shutil.copytree(starter, tmp_path / "base")
    for other in (None, "{{ raise_exception('the template of the base') }}"):
        if other is not None:
            (base / "chat_template.jinja").write_text(other)
        assert main(["generate", str(base), "--adapter", str(tmp_path / "run/export/adapter"), *ask]) == 0
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize("arguments, said", [
    (["--chat"], "the model has no chat template; give --chat-template"),
    (["--chat", "--chat-template", "nothing"], "chat template nothing"),
    (["--system", "x"], "--system and --chat-template belong to --chat"),
])  # fmt: skip
def test_a_chat_that_cannot_be_is_one_line(starter, capsys, arguments, said):
    assert main(["generate", str(starter), "--prompt", "x", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and said in error


REAL = [
    ("lf_identity.json", {}),
    ("lf_kto_en_demo.json", {}),
    ("lf_glaive_toolcall_en_demo.json", {}),
    ("lf_dpo_en_demo.json", {"columns": {"completion": "chosen"}}),
    ("lf_c4_demo.jsonl", {}),
    ("alpaca_seed_tasks.jsonl", {"columns": {"input": "instances.0.input", "output": "instances.0.output"}}),
    ("gsm8k_test.jsonl", {"columns": {"prompt": "question", "completion": "answer"}}),
    ("hh_rlhf_harmless_test_1000.jsonl", {"columns": {"text": "chosen"}}),
    ("TruthfulQA.csv", {"columns": {"prompt": "Question", "completion": "Best Answer"}}),
]


def test_a_mixture_of_real_files_trains_and_resumes_in_the_middle(make_run, tmp_path, assets, stories):
    """Every kind of file in one run; stopped after half of the steps and taken up again, it ends where it would have."""
    sources = [
        {"path": str(assets / "data" / name), "weight": weight, **options}
        for (name, options), weight in zip(REAL, (1, 0.25, 0.1, 0.5, 1.5, 1, 0.1, 0.2, 1), strict=True)
    ]
    sections = {"model": stories, "data": {"chat_template": str(tmp_path / "chat.jinja")}}
    sections |= {"checkpoint": {"every": 3}, "evaluate": {"every": None}}
    run = make_run(sources, steps=6, **sections)
    llmtune.train(run)
    whole, _ = read_curve(run.output)
    shutil.rmtree(Path(run.output) / "checkpoints" / "6")
    llmtune.train(run)
    again, _ = read_curve(run.output)
    assert len(whole) == 6 and whole.tolist() == again.tolist()
    assert whole[-1] < 6
