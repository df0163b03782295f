"""Added tokens and whole weights from end to end, against transformers and peft: training, adapter, merged model, tokenizer."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmtune
from tests.checkpoints_convert.test_peft_whole import make_adapter, resized
from tests.parity.reference import load_reference, save_model
from tests.parity.torch_training import cosine, token_loss, train_peer
from tests.runs import curve, run_config, write_rows
from tests.training.interruption import StoppingDisplay

WORD, CONTROL = "<|think|>", "<|im_start|>"
ROWS = [
    {"prompt": f"Once {WORD} upon", "completion": f" a time {WORD} there was a girl {CONTROL} "},
    {"prompt": "One day", "completion": f" she {WORD}saw a ball{WORD}"},
    {"prompt": f"{WORD}", "completion": " The dog ran to the park."},
]
TOKENS = np.random.default_rng(0).integers(3, 514, (2, 48))
KINDS = ["tied", "gqa untied"]


@pytest.fixture(scope="module")
def bases(stories, tmp_path_factory):
    """A tied and an untied model with the stories' tokenizer, of sizes that eight devices can share."""
    directory = tmp_path_factory.mktemp("bases")
    sizes = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    bases = {kind: save_model(kind, directory / kind, **sizes, num_hidden_layers=2) for kind in KINDS}
    for base in bases.values():
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(stories / file, base)
    return bases


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def grown_run(directory, base, rows, name="run", **sections):
    own = {"add_tokens": [WORD], "add_special_tokens": [CONTROL]}
    defaults = {
        "data": {"train": str(rows), "sequence_length": 64, **own},
        "adapt": {"rank": 4, "alpha": 8},
        "train": {"steps": 6, "batch_size": 2, "dtype": "float32"},
    }
    return run_config(directory, base, rows, name=name, **{**defaults, **sections})


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def test_a_text_tower_grows_where_its_configuration_says(stories, rows, tmp_path):
    """Its vocabulary stands in text_config, its embedding a module deeper."""
    base = save_model("mistral 3, text tower", tmp_path / "base", vocab_size=512)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(stories / file, base)
    curve(grown_run(tmp_path, base, rows, train={"steps": 1, "batch_size": 2, "dtype": "float32"}))
    ours, merged = llmtune.load(tmp_path / "run"), llmtune.load(tmp_path / "run/export/model")
    assert ours.config.vocab_size == merged.config.vocab_size == 576
    written = json.loads((tmp_path / "run/export/model/config.json").read_text())
    assert written["text_config"]["vocab_size"] == 576 and "vocab_size" not in written
    np.testing.assert_allclose(ours.logits(TOKENS), merged.logits(TOKENS), atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits(load_reference(tmp_path / "run/export/model")), merged.logits(TOKENS), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_train_and_load_in_peft_and_transformers(bases, rows, tmp_path, kind):
    said = StoppingDisplay()
    curve(grown_run(tmp_path, bases[kind], rows), display=said)
    assert "vocabulary: 2 tokens added (ids 512 to 513), 576 rows" in said.text
    ours = llmtune.load(tmp_path / "run")
    assert ours.config.vocab_size == 576
    adapter, expected = tmp_path / "run/export/adapter", ours.logits(TOKENS)

    base = AutoModelForCausalLM.from_pretrained(bases[kind])
    base.resize_token_embeddings(576)  # the two lines of docs/vocabulary.md
    theirs = PeftModel.from_pretrained(base, adapter)
    np.testing.assert_allclose(logits(theirs), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits(theirs.merge_and_unload()), expected, atol=1e-4, rtol=0)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/model")
    assert merged.config.vocab_size == 576 and merged.config.tie_word_embeddings == (kind == "tied")
    np.testing.assert_allclose(logits(merged), expected, atol=1e-4, rtol=0)
    for directory in (adapter, tmp_path / "run/export/model"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        for row in ROWS:
            text = row["prompt"] + row["completion"]
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            assert ours.tokenizer.encode(text, bos=False) == ids and 512 in ids and 513 not in ids

    before, after = (load_file(path / "model.safetensors") for path in (bases[kind], tmp_path / "run/export/model"))
    moved = {name for name in before if before[name].tobytes() != after[name][: len(before[name])].tobytes()}
    ends = {"model.embed_tokens.weight", "lm_head.weight"} & set(before)
    assert moved == ends | {name for name in before if "proj" in name}  # no norm trained


def test_full_fine_tuning_with_added_tokens(bases, rows, tmp_path):
    run = grown_run(tmp_path, bases["gqa untied"], rows, adapt=None)
    curve(run)
    ours, merged = llmtune.load(tmp_path / "run"), AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/model")
    np.testing.assert_allclose(logits(merged), ours.logits(TOKENS), atol=1e-4, rtol=0)
    assert ours.tokenizer.encode(WORD, bos=False) == [512]
    assert AutoTokenizer.from_pretrained(tmp_path / "run/export/model").convert_tokens_to_ids(CONTROL) == 513


@pytest.mark.parametrize("kind", KINDS)
def test_whole_weights_follow_peft_from_the_same_adapter(bases, tmp_path, kind):
    """Twelve steps on a resized base, whose embedding, head and norms train beside the factors."""
    tying = {"ensure_weight_tying": True} if kind == "tied" else {}
    modules = ["embed_tokens", "lm_head", "norm"]
    adapter = make_adapter(
        bases[kind], 514, tmp_path / "adapter", modules_to_save=modules, init_lora_weights=True, **tying
    )
    tokens = np.random.default_rng(1).integers(3, 514, (12, 4, 32))
    data = write_rows(tmp_path / "rows.jsonl", tokens, tokens)
    losses, norms = curve(
        run_config(tmp_path, bases[kind], data, adapt={"from": str(adapter)},
                   train={"steps": 12, "batch_size": 4, "dtype": "float32"})
    )  # fmt: skip
    model = PeftModel.from_pretrained(resized(bases[kind], 514), adapter, is_trainable=True)
    options = {"learning_rate": 1e-3, "schedule": cosine(12, 3), "weight_decay": 0.1, "clip_norm": 1.0}
    peer = train_peer(model, zip(tokens, tokens, strict=True), **options)
    np.testing.assert_allclose(losses, [loss for loss, _ in peer], rtol=1e-4)
    np.testing.assert_allclose(norms, [norm for _, norm in peer], rtol=1e-3)
    exported = PeftModel.from_pretrained(resized(bases[kind], 514), tmp_path / "run/export/adapter")
    np.testing.assert_allclose(logits(exported), llmtune.load(tmp_path / "run").logits(TOKENS), atol=1e-4, rtol=0)
    with torch.no_grad():
        assert token_loss(exported, tokens[0], tokens[0]) < losses[0]


def test_nothing_trained_is_nothing_changed(bases, tmp_path):
    """In and out again, with a rate that rounds to no step: the old rows keep their bytes."""
    adapter = make_adapter(
        bases["tied"], 576, tmp_path / "theirs", modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    tokens = np.random.default_rng(1).integers(3, 514, (1, 4, 32))
    data = write_rows(tmp_path / "rows.jsonl", tokens, tokens)
    rate = {"learning_rate": 1e-30, "schedule": "constant", "warmup_steps": 0}
    curve(run_config(tmp_path, bases["tied"], data, adapt={"from": str(adapter)}, optimizer=rate,
                     train={"steps": 1, "batch_size": 4, "dtype": "float32"}))  # fmt: skip
    one, other = (load_file(d / "adapter_model.safetensors") for d in (adapter, tmp_path / "run/export/adapter"))
    assert all(one[key].tobytes() == other[key].tobytes() for key in other)
