"""A run from YAML: numbers as people write them, every mistake one line that names the key, defaults that stay."""

import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.config import Run, key_reference
from llmtune.config.adapt import Lora
from llmtune.config.file import dump_run, load_run
from llmtune.data import RunData
from llmtune.errors import LlmtuneConfigError

MINIMAL = "model: path/to/hf_dir\noutput: runs/example\ndata: {train: train.jsonl}\n"

# The documented example; its names and its values, which are the defaults, are a promise.
EXAMPLE = """
model: path/to/hf_dir
output: runs/example
objective: sft
data:
  train: train.jsonl
  validation: validation.jsonl
  format: auto
  sequence_length: 1024
  packing: true
  shuffle: true
adapt: {method: lora, rank: 16, alpha: 32, targets: all-linear}
optimizer: {name: adamw, learning_rate: 2.0e-4, schedule: cosine, warmup_steps: 10, weight_decay: 0.0, clip_norm: 1.0}
train: {steps: 200, batch_size: 8, microbatches: 1, dtype: bfloat16, remat: block, seed: 0}
sharding: {strategy: fsdp, mesh: {fsdp: -1, tensor: 1}}
checkpoint: {every: 100, keep: 3}
evaluate: {every: 50}
"""


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_run(path, overrides)

    return load


@pytest.fixture
def refusal(load, tmp_path):
    """What is said, in one line, of lines added to the smallest configuration; without the name of the file."""

    def refusal(lines, *overrides, base=MINIMAL):
        with pytest.raises(LlmtuneConfigError) as caught:
            load(lines if isinstance(lines, bytes) else base + lines, *overrides)
        said = str(caught.value)
        assert len(said.splitlines()) == 1 and len(said) < 400
        return said.removeprefix(f"{tmp_path / 'run.yaml'}: ")

    return refusal


def test_the_defaults_are_those_of_the_documented_example(load):
    example, minimal = load(EXAMPLE), load(MINIMAL)
    assert minimal.adapt is None and minimal.sharding is None and minimal.data.validation is None
    steps = RunData(None, None, None, "", ()).steps
    assert steps(minimal) == steps(example) == 200
    filled = dataclasses.replace(
        minimal,
        data=dataclasses.replace(minimal.data, validation="validation.jsonl"),
        adapt=Lora(),
        train=dataclasses.replace(minimal.train, steps=200),
        sharding=example.sharding,
    )
    assert filled == example
    assert (example.sharding.strategy, example.sharding.mesh) == ("fsdp", {"fsdp": -1, "tensor": 1})
    torch = minimal.optimizer
    assert (torch.b1, torch.b2, torch.eps, torch.decay) == (0.9, 0.999, 1e-8, "all")


def test_every_key_has_a_type_a_default_and_help():
    rows = key_reference()
    assert all(len(text) > 3 and kind and default for _, kind, default, text in rows)
    assert len({path for path, *_ in rows}) == len(rows)
    assert {"model", "data.train", "adapt.from", "optimizer.learning_rate", "evaluate.prompts"} <= {
        row[0] for row in rows
    }
    assert not [row for row in rows if "typing" in row[1] or "NoneType" in row[1] or "factory" in row[2]]


@pytest.mark.parametrize(
    "lines, said",
    [
        ("trian: {steps: 3}", "trian: unknown key; did you mean train?"),
        ("train: {stepz: 3}", "train.stepz: unknown key; did you mean train.steps?"),
        ("train: {step: 3}", "train.step: unknown key; did you mean train.steps?"),
        ("optimizer: {learningrate: 1}", "optimizer.learningrate: unknown key; did you mean optimizer.learning_rate?"),
        ("learning_rate: 1", "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        ("Adapt: {}", "Adapt: unknown key; did you mean adapt?"),
        ("adapt: {from_: x}", "adapt.from_: unknown key; did you mean adapt.from?"),
        ("adapt: {method: ia3, feedforwrd: [x]}", "adapt.feedforwrd: unknown key; did you mean adapt.feedforward?"),
        ("adapt: {method: ia3, rank: 8}", "adapt.rank: unknown key; llmtune train --help lists all keys"),
        ("adapt: [{rnak: 2}]", "adapt.0.rnak: unknown key; did you mean adapt.0.rank?"),
        ("str: 3", "str: unknown key; llmtune train --help lists all keys"),
        ("train.steps: 3", "train.steps: written as one key; write train: {steps: ...}"),
    ],
)
def test_a_typo_is_told_the_nearest_key(refusal, lines, said):
    assert refusal(lines) == said


def test_a_typo_is_named_before_the_key_that_it_left_missing(refusal):
    assert refusal("modle: x", base="output: x\ndata: {train: x}\n") == "modle: unknown key; did you mean model?"
    assert refusal("", base="output: x\ndata: {train: x}\n") == "model: this key is required"
    assert refusal("", base="model: x\noutput: x\ndata: {}\n") == "data.train: this key is required"


@pytest.mark.parametrize(
    "lines, said",
    [
        ("train: {steps: many}", 'train.steps: "many" is not a valid integer'),
        ("train: {steps: 3.0}", "train.steps: 3.0 is not a valid integer"),
        ("train: {steps: true}", "train.steps: true is not a valid integer"),
        ("train: {steps: '3'}", 'train.steps: "3" is not a valid integer'),
        ("train: {batch_size: null}", "train.batch_size: null is not a valid integer"),
        ("train: 3", "train: 3 is not a section of keys"),
        ("train:", "train: null is not a section of keys"),
        ("adapt: [rank, 8]", 'adapt.0: "rank" is not a section of keys'),
        ("adapt: rank", 'adapt: "rank" is not a section of keys'),
        ("adapt: {method: lorra}", 'adapt.method: "lorra" is no method; did you mean lora?'),
        ("adapt: [{rank: 8}, {rank: many}]", 'adapt.1.rank: "many" is not a valid integer'),
        ("adapt: {targets: [q_proj, 3]}", "adapt.targets.1: 3 is not a valid string"),
        ("optimizer: {learning_rate: fast}", 'optimizer.learning_rate: "fast" is not a valid number'),
        ("optimizer: {learning_rate: no}", 'optimizer.learning_rate: "no" is not a valid number'),
        ("objective: sfft", "objective: \"sfft\" is not 'pretrain' or 'sft'"),
        ("evaluate: {prompts: Hello}", 'evaluate.prompts: "Hello" is not a valid array'),
        ('evaluate: {prompts: ["\\ud800"]}', "a text holds a lone surrogate, which is no character"),
        ("sharding: {mesh: {FSDP: two}}", 'sharding.mesh.FSDP: "two" is not a valid integer'),
    ],
)
def test_a_wrong_type_is_named_with_its_key_and_value(refusal, lines, said):
    assert refusal(lines) == said


def test_a_long_value_is_shown_in_part(refusal):
    said = refusal(f"adapt: {{from: {['long'] * 500}}}")
    assert said.startswith('adapt.from: ["long", "long", ') and said.endswith("... is not a valid string")


@pytest.mark.parametrize(
    "lines, key",
    [
        ("train: {steps: 0}", "train.steps"),
        ("train: {steps: 99999999999999999999}", "train.steps"),
        ("train: {steps: 3, epochs: 1}", "train"),
        ("train: {epochs: .nan}", "train.epochs"),
        ("train: {batch_size: 8, microbatches: 3}", "train.microbatches"),
        ("train: {microbatches: 0}", "train.microbatches"),
        ("train: {seed: -1}", "train.seed"),
        ("optimizer: {learning_rate: 0}", "optimizer.learning_rate"),
        ("optimizer: {learning_rate: .inf}", "optimizer.learning_rate"),
        ("optimizer: {b2: 1}", "optimizer.b2"),
        ("optimizer: {clip_norm: 0}", "optimizer.clip_norm"),
        ("optimizer: {weight_decay: -0.1}", "optimizer.weight_decay"),
        ("adapt: {rank: 0}", "adapt.rank"),
        ("adapt: {targets: []}", "adapt.targets"),
        ("adapt: []", "adapt"),
        ("adapt: [{rank: 2}, {rank: 0}]", "adapt.1.rank"),
        ("adapt: {dropout: 1.0}", "adapt.dropout"),
        ("adapt: {layers: []}", "adapt.layers"),
        ("adapt: {b_rate: 0}", "adapt.b_rate"),
        ("adapt: {rank_pattern: {q_proj: 0}}", "adapt.rank_pattern.q_proj"),
        ("adapt: {method: vera, rank: 0}", "adapt.rank"),
        ("adapt: {method: ia3, from: x, modules_to_save: [norm]}", "adapt.modules_to_save"),
        ("adapt: [{method: lora}, {method: ia3}]", "adapt"),
        ("adapt: [{method: lora}, {method: lora, rslora: true}]", "adapt"),
        ("adapt: [{method: full}, {method: full}]", "adapt.0"),
        ("checkpoint: {keep: 0}", "checkpoint.keep"),
        ("evaluate: {every: -5}", "evaluate.every"),
    ],
)
def test_an_impossible_value_is_named_with_its_key(refusal, lines, key):
    assert refusal(lines).startswith(f"{key}: ")


@pytest.mark.parametrize(
    "data, key",
    [
        ("train: ''", "data.train"),
        ("train: []", "data.train"),
        ("train: x, sequence_length: 1", "data.sequence_length"),
        ("train: x, columns: {promt: y}", "data.columns"),
    ],
)
def test_an_impossible_value_of_data_is_named_with_its_key(refusal, data, key):
    assert refusal("", base=f"model: x\noutput: x\ndata: {{{data}}}\n").startswith(f"{key}: ")


@pytest.mark.parametrize(
    "written, value",
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("+1e-5", 1e-5),
        ("1.e-5", 1e-5),
        ("2.0e-4", 2e-4),
        (".5", 0.5),
        ("1", 1),
        ("3e2", 300),
    ],
)
def test_numbers_are_read_as_people_write_them(load, written, value):
    for rate in (
        load(MINIMAL + f"optimizer: {{learning_rate: {written}}}").optimizer.learning_rate,
        load(MINIMAL, "--optimizer.learning_rate", written).optimizer.learning_rate,
    ):
        assert rate == value and isinstance(rate, float)


@pytest.mark.parametrize("written", ["no", "on", "y", "12:30:45", "2024-01-01", "0x10", "010a", "<<", "=", "1e", "~x"])
def test_words_that_yaml_would_turn_into_something_else_stay_words(load, written):
    assert load(MINIMAL + f"evaluate: {{prompts: [{written}]}}").evaluate.prompts == [written]


def test_a_key_that_stands_twice_is_refused_with_its_line(refusal):
    assert refusal("train:\n  steps: 3\n  steps: 4") == "line 6: the key 'steps' stands twice; remove one of them"
    assert refusal("output: x") == "line 4: the key 'output' stands twice; remove one of them"


def test_anchors_aliases_and_tags_are_refused(refusal):
    """A few lines of aliases expand to gigabytes."""
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    start = time.monotonic()
    assert refusal(bomb) == "line 4: YAML anchors and aliases are not read here; write the value out"
    assert time.monotonic() - start < 1
    assert refusal("a: *b").startswith("line 4: YAML anchors")
    for tag in (
        "!!binary aGk=",
        "!!timestamp 2020-01-01",
        "!!set {a}",
        "!!bool x",
        "!!map [1]",
        "!!python/name:os.system",
        "!x y",
    ):
        assert refusal(f"train: {tag}") == f"line 4: YAML tags are not read here; remove {tag.split()[0]}"


@pytest.mark.parametrize(
    "text, said",
    [
        (b"", "a mapping of keys to values is expected"),
        (b"- model", "a mapping of keys to values is expected"),
        (b"model: caf\xe9", "not UTF-8 (byte 10)"),
        (b"model: \x00", "special characters are not allowed"),
        (b"\tmodel: x", "line 1: found character '\\t' that cannot start any token"),
        (b"train: {steps: 3", "line 1: expected ',' or '}', but got '<stream end>'"),
        (b"a: 1\n---\nb: 2", "line 2: but found another document"),
        pytest.param(b"[" * 100_000, "nested more than 20 deep", id="deep"),
        (b"[a]: 3", "line 1: the key ['a'] is not a name"),
        (b"3: 3", "line 1: the key 3 is not a name"),
        pytest.param(b"x" * 1_000_001, "larger than 1,000,000 bytes; this is no configuration", id="large"),
    ],
)
def test_what_is_no_configuration_is_one_line(refusal, text, said):
    assert refusal(text) == said


def test_a_missing_file_is_one_line(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(LlmtuneConfigError, match=rf"^{path}: cannot be read \(.*\); give the path of a YAML file$"):
            load_run(path)


def test_overrides_are_put_over_the_file(load):
    run = load(
        EXAMPLE, "--train.steps", "7", "--optimizer.clip_norm=null", "--data.train", "[a.jsonl, b.jsonl]",
        "--adapt.targets=q_proj", "--data.columns.prompt", "question", "--sharding.mesh.fsdp", "-1", "--train.steps=9",
    )  # fmt: skip
    assert (run.train.steps, run.optimizer.clip_norm, run.adapt.targets) == (9, None, "q_proj")
    assert (run.data.train, run.data.columns) == (["a.jsonl", "b.jsonl"], {"prompt": "question"})
    assert run.sharding.mesh == {"fsdp": -1, "tensor": 1}
    assert load(EXAMPLE, "--adapt", "null").adapt is None
    assert load(MINIMAL, "--adapt.rank", "8").adapt == Lora(rank=8)
    assert load(MINIMAL, "--model=a=b").model == "a=b"


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["--train.stepz=3"], "train.stepz: unknown key; did you mean train.steps?"),
        (["--train.steps=x"], 'train.steps: "x" is not a valid integer'),
        (["--train.steps"], "--train.steps: a value is missing after it"),
        (["train.steps", "3"], "'train.steps': overrides are written --section.key value"),
        (["--model.path", "x"], "--model.path: model is no section"),
        (["--train..steps", "3"], "'--train..steps': overrides are written --section.key value"),
        (["--=3"], "'--': overrides are written --section.key value"),
        (["--data.train=[a"], "--data.train: line 1: expected ',' or ']', but got '<stream end>'"),
        (["--data.train="], "data.train: null is not a valid string"),
    ],
)
def test_a_wrong_override_is_one_line(refusal, overrides, said):
    assert refusal("", *overrides) == said


def test_what_is_written_reads_back_equal(load):
    several = load(MINIMAL, "--adapt=[{rank: 3, layers: [0]}, {targets: mlp}]")
    for run in (load(MINIMAL), load(EXAMPLE), several, load(MINIMAL, "--adapt.from=dir", "--optimizer.clip_norm=null")):
        assert load(dump_run(run)) == run
    assert "from: dir" in dump_run(run) and "clip_norm: null" in dump_run(run)


TRICKY = st.from_regex(r"[-+]?[0-9_.eE+-]{1,6}|true|no|~|null|0x1|1:2|<<|=|- a|a: b|#c|\{|'|\"", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | TRICKY


@given(
    output=TEXTS, prompts=st.lists(TEXTS), rate=st.floats(1e-300, 1e300), extra=st.dictionaries(TEXTS, st.integers())
)
@settings(max_examples=80, deadline=None)
def test_any_texts_and_numbers_read_back_equal(tmp_path_factory, output, prompts, rate, extra):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(EXAMPLE)
    run = load_run(path)
    run = dataclasses.replace(
        run,
        output=output,
        evaluate=dataclasses.replace(run.evaluate, prompts=prompts),
        optimizer=dataclasses.replace(run.optimizer, learning_rate=rate),
        sharding=dataclasses.replace(run.sharding, mesh=extra),
    )
    path.write_bytes(dump_run(run).encode())
    assert load_run(path) == run


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_a_run_or_one_line(tmp_path_factory, data):
    at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(EXAMPLE))] * 2)))
    end = data.draw(st.sampled_from([at, at + 1, end]))
    inserted = data.draw(st.text("{}[]:,-&*!|>'\"%@`#? \n\tae01.~", max_size=4) | TEXTS)
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes((EXAMPLE[:at] + inserted + EXAMPLE[end:]).encode())
    try:
        assert isinstance(load_run(path), Run)
    except LlmtuneConfigError as error:
        assert len(str(error).splitlines()) == 1
