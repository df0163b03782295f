"""What a run taught goes with its export: chat template, tokenizer, and where an answer ends."""

import json
import shutil

import jax
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmtune
from llmtune.chat import find_template
from llmtune.tokenizers.conversation import Conversation, Message
from llmtune.training.export import write_ends
from tests.runs import FULL_BY_DAY, LORA_BY_DAY, run_config

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def chat_run(stories, tmp_path):
    """A run on one conversation with a template and control tokens of its own; its template's file is gone afterwards."""

    def chat_run(**sections):
        rows, template = tmp_path / "rows.jsonl", tmp_path / "own.jinja"
        rows.write_text(json.dumps({"messages": MESSAGES}) + "\n")
        template.write_text(CHATML)
        data = {"train": str(rows), "sequence_length": 64, "chat_template": str(template)}
        data |= {"add_special_tokens": ["<|im_start|>", "<|im_end|>"], **sections.pop("data", {})}
        train = {"steps": 1, "batch_size": 2, "dtype": "float32"}
        llmtune.train(
            run_config(tmp_path, stories, rows, data=data, train=train, **sections), devices=jax.devices()[:1]
        )
        template.unlink()
        return tmp_path / "run"

    return chat_run


@pytest.mark.parametrize("adapt", LORA_BY_DAY)
def test_other_programs_find_the_chat_template_and_the_end_of_a_turn(chat_run, adapt):
    path = chat_run(adapt=adapt)
    theirs = AutoTokenizer.from_pretrained(path / "export/model")
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(path / "export/model")
    assert model.generation_config.eos_token_id == [1, 2, end]  # the model's own, and the run's
    assert model.generation_config.do_sample is False  # of the model's generation_config.json

    own = llmtune.load(path)
    assert own.config.eos_token_ids == (1, 2, end)
    conversation = Conversation(tuple(Message(**message) for message in MESSAGES[:1]))
    ids = find_template(own, path).encode(conversation, add_generation_prompt=True).ids
    for directory in path.glob("export/*"):
        text = AutoTokenizer.from_pretrained(directory).apply_chat_template(
            MESSAGES[:1], add_generation_prompt=True, tokenize=False
        )
        assert text == "<|im_start|>user\nHi <|im_end|><|im_end|><|im_start|>assistant\n"
    assert ids.count(end) == 1  # that of the template; what the user says stays text


@pytest.mark.parametrize("adapt", FULL_BY_DAY)
def test_another_tokenizer_is_exported_with_the_models_own_notices(chat_run, stories, tmp_path, adapt):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories / name, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<unk>", "chat_template": CHATML}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    path = chat_run(adapt=adapt, data={"tokenizer": str(other), "add_special_tokens": [], "chat_template": None})
    assert sorted(file.name for file in (path / "export/model").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "provenance.json", "tokenizer.json",
        "tokenizer_config.json"
    ]  # fmt: skip
    notices = json.loads((path / "export/model/generation_config.json").read_text())
    assert notices == {"bos_token_id": 1, "eos_token_id": [0], "do_sample": False}
    own = llmtune.load(path)
    assert own.tokenizer.eos_ids == own.config.eos_token_ids == (0,)
    assert find_template(own, path).jinja == CHATML
    if adapt is not None:
        assert 'eos_token": "<unk>' in (path / "export/adapter/tokenizer_config.json").read_text()


def test_ends_that_are_named_already_leave_the_file_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}')
    write_ends(tmp_path, (2,), known=True)
    assert not (tmp_path / "generation_config.json").exists()
    write_ends(tmp_path, (7, 2), known=True)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 7]}
