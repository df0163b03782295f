"""The command line: a user's mistake is one line on stderr and exit code 2, and leaves nothing behind."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

import llmtune
from llmtune.cli import main
from llmtune.config.file import dump_run, load_run

ROW = {"prompt": "Name an animal:", "completion": " a hedgehog"}


@pytest.fixture(autouse=True)
def global_state(monkeypatch):
    """What the command sets for its process is put back."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    level = logging.getLogger("absl").level
    yield
    logging.getLogger("absl").setLevel(level)


@pytest.fixture
def refusal(capfd):
    """The one line that a refused command prints, without `llmtune: error: `."""

    def refusal(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's own
            code = error.code
        said = capfd.readouterr().err
        assert code == 2
        assert said.endswith("\n") and len(said.splitlines()) == 1, said
        program, marked, said = said.strip().partition(": error: ")
        assert marked and program.split()[0] == "llmtune"
        return said

    return refusal


@pytest.fixture
def write_run(tmp_path):
    """The YAML of a run that would work, but for what is given."""

    def write_run(rows=None, **sections):
        data = tmp_path / "rows.jsonl"
        if rows is not None or not data.exists():
            data.write_bytes(rows if isinstance(rows, bytes) else json.dumps(rows or ROW).encode() + b"\n")
        tree = {
            "model": "llmtune:starter",
            "output": str(tmp_path / "output"),
            "train": {"steps": 2, "batch_size": 8, "dtype": "float32"},
            **sections,
            "data": {"train": str(data), "sequence_length": 64, **sections.get("data", {})},
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(tree))
        return path

    return write_run


@pytest.fixture
def model(starter, tmp_path):
    """A copy of the starter model, to be damaged."""
    return shutil.copytree(starter, tmp_path / "model")


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"optimzer": {}}, "{run}: optimzer: unknown key; did you mean optimizer?"),
        ({"train": {"steps": "many"}}, '{run}: train.steps: "many" is not a valid integer'),
        ({"train": {"batch_size": 8, "microbatches": 3}}, "{run}: train.microbatches: 3 does not divide"),
        ({"model": "nowhere/to/be/found"}, "model: 'nowhere/to/be/found' is neither a directory nor a preset (presets: "),
        ({"model": "."}, ".: no config.json there"),
        ({"model": "x" * 5000}, "{long}.yaml: File name too long"),
        ({"data": {"train": "{tmp}/none.jsonl"}}, "{tmp}/none.jsonl: no such file"),
        ({"data": {"train": "x" * 5000}}, "{long}: File name too long"),
        ({"data": {"validation": "{tmp}/none.jsonl"}}, "{tmp}/none.jsonl: no such file"),
        ({"data": {"tokenizer": "{tmp}"}}, "data.tokenizer: {tmp} holds no tokenizer.json and no tokenizer.model"),
        ({"data": {"format": "text"}}, "{tmp}/rows.jsonl:1: the column 'text' is missing"),
        ({"data": {"columns": {"prompt": "question"}}}, "{tmp}/rows.jsonl:1: no format has the columns"),
        ({"data": {"sequence_length": 8, "too_long": "error"}}, "{tmp}/rows.jsonl:1: "),
        ({"data": {"sequence_length": 8, "too_long": "drop"}}, "data.train: nothing to train on: every row was left out"),
        ({"sharding": {"strategy": "fdsp"}}, "sharding.strategy: no strategy 'fdsp'; known: context, context_expert, ddp"),
        ({"sharding": {"mesh": {"fsdp": 3}}}, "sharding.mesh"),
        ({"sharding": {"mesh": {"fsdp": 3}}, "data": {"train": "{tmp}/none.jsonl"}}, "sharding.mesh"),  # before data are read
        ({"train": {"batch_size": 10**12}}, "{run}: train.batch_size: 1000000000000 rows of data.sequence_length 64 are"),
        ({"optimizer": {"warmup_steps": 2**31}}, "{run}: optimizer.warmup_steps: 2147483648 must lie in 0..2147483647"),
        ({"safeguards": {"join_seconds": 1e300}}, "{run}: safeguards.join_seconds: 1e+300 is more than 1000000 seconds"),
        ({"sharding": {"mesh": {"fdsp": 8}}}, "sharding.mesh"),
        ({"output": "{tmp}/rows.jsonl/output"}, "{tmp}/rows.jsonl/output"),
        ({"output": "x" * 5000}, "{long}/config.yaml: File name too long"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_carried_out_is_refused(refusal, write_run, tmp_path, sections, said):
    run = write_run(**json.loads(json.dumps(sections).replace("{tmp}", str(tmp_path))))
    expected = said.format(run=run, tmp=tmp_path, long="x" * 5000)
    assert expected in refusal("train", run)
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "run.yaml"]


@pytest.mark.parametrize(
    "rows, said",
    [
        (b"", ": the file is empty"),
        (b"\n \n", ": the file holds no rows"),
        (b'{"prompt": "x", "completion": "caf\xe9"}', ":1: not UTF-8"),
        (json.dumps(ROW).encode() + b'\n\n{"prompt": "x"\n', ":3: not valid JSON"),
        (json.dumps(ROW).encode() + b"\n[1]\n", ":2: a row is an object of columns, not list"),
        (json.dumps(ROW).encode() + b'\n{"prompt": "x"}\n', ":2: the column 'completion' is missing"),
        (json.dumps(ROW).encode() + b'\n{"prompt": "x", "completion": ""}\n', ":2: the row has no target token"),
        (b'{"prompt": "x", "completion": "\\ud83d"}', ":1: the text holds a lone surrogate"),
        (b'{"prompt": "x", "completion": 3}', ":1: the column 'completion' is int, a text is expected"),
        (b'{"intro": "x", "outro": "y"}', ":1: no format has the columns ['intro', 'outro']"),
        (b'{"input_ids": [1, 2, 1024]}', ":1: input_ids holds 1024; token ids of this model lie in 0..1023"),
        (b'{"input_ids": [1, 2], "labels": [-100, -100]}', ":1: the row has no target token"),
    ],
)
def test_data_that_cannot_be_used_are_refused_by_file_and_line(refusal, write_run, tmp_path, rows, said):
    run = write_run(rows)
    assert refusal("train", run).startswith(f"{tmp_path / 'rows.jsonl'}{said}")
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "run.yaml"]


def test_a_missing_configuration_is_refused(refusal, tmp_path):
    assert refusal("train", tmp_path / "none.yaml").startswith(f"{tmp_path / 'none.yaml'}: cannot be read")


def test_wrong_overrides_are_refused(refusal, write_run):
    assert "train.stepz: unknown key; did you mean train.steps?" in refusal("train", write_run(), "--train.stepz", "3")
    assert "overrides are written --section.key value" in refusal("train", write_run(), "train.steps", "3")


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(refusal, write_run, model, tmp_path, command):
    edit(model / "config.json", vocab_size=500)
    given = {"train": ["train", write_run(model=str(model))], "generate": ["generate", model, "--prompt", "x"]}
    assert "the model's vocabulary has 500; they do not belong together" in refusal(*given[command])
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "file, content",
    [
        ("config.json", b"{"),
        ("config.json", b'{"architectures": ["GPT2LMHeadModel"]}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"[]"),
        ("model.safetensors", b"cut off"),
    ],
)
@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_damaged_model_is_refused_by_file(refusal, write_run, model, tmp_path, command, file, content):
    (model / file).write_bytes(content)
    given = {"train": ["train", write_run(model=str(model))], "generate": ["generate", model, "--prompt", "x"]}
    assert refusal(*given[command]).startswith(str(model / file))
    assert not (tmp_path / "output").exists()


def test_an_output_directory_that_holds_another_run_is_left_alone(refusal, write_run, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.yaml").write_text(dump_run(load_run(write_run(train={"steps": 3, "batch_size": 8}))))
    before = (output / "config.yaml").read_bytes()
    said = refusal("train", write_run(train={"steps": 2, "batch_size": 8}))
    assert said.startswith(
        f"output: {output} holds another run (train.steps: 3 there, 2 here); give the same configuration"
    )
    assert said.endswith(f"or choose another output: with continue_from: {output} it begins with this run's weights")
    assert os.listdir(output) == ["config.yaml"] and (output / "config.yaml").read_bytes() == before


def test_an_output_directory_that_holds_foreign_files_is_left_alone(refusal, write_run, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "thesis.tex").write_text("mine")
    assert "exists and is no llmtune run" in refusal("train", write_run())
    assert os.listdir(output) == ["thesis.tex"] and (output / "thesis.tex").read_text() == "mine"
    (output / "config.yaml").write_text("model: somebody's\n")
    assert str(output) in refusal("train", write_run())
    assert (output / "config.yaml").read_text() == "model: somebody's\n"


@pytest.mark.parametrize("content", [b"- a\n", b""])
def test_an_output_directory_with_another_configuration_is_left_alone(refusal, write_run, tmp_path, content):
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.yaml").write_bytes(content)
    assert str(output) in refusal("train", write_run())
    assert os.listdir(output) == ["config.yaml"] and (output / "config.yaml").read_bytes() == content


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere", "--prompt", "x"], "model: 'nowhere' is neither a directory nor a preset"),
        ([".", "--prompt", "x"], ".: no config.json there"),
        (["llmtune:starter"], "the following arguments are required: --prompt"),
        (["llmtune:starter", "--prompt", "x", "--tempr", "3"], "unknown argument '--tempr'"),
        (["llmtune:starter", "--prompt", "x", "--max-new-tokens", "many"], "argument --max-new-tokens: invalid int value"),
        (["llmtune:starter", "--prompt", "x", "--max-new-tokens", "-1"], "max_new_tokens"),
        (["llmtune:starter", "--prompt", "x", "--temperature", "-1"], "temperature: -1.0 must be 0 (greedy) or"),
        (["llmtune:starter", "--prompt", "x", "--top-p", "2"], "top_p: 2.0 must lie in (0, 1]"),
        (["llmtune:starter", "--prompt", "x", "--dtype", "int3"], "dtype: 'int3' is not one of float32"),
        (["llmtune:starter", "--prompt", "x", "--strategy", "magic"], "no strategy 'magic'"),
        (["llmtune:starter", "--prompt", "x", "--adapter", "nowhere"], "nowhere"),
        (["llmtune:starter", "--prompt", "not \udcff UTF-8"], "the text holds a lone surrogate (U+DCFF at character 4)"),
        (["starter", "--prompt", "x"], "starter: it has no tokenizer"),
    ],
)  # fmt: skip
def test_a_generation_that_cannot_be_carried_out_is_refused(refusal, arguments, said):
    assert said in refusal("generate", *arguments)


def test_a_run_that_is_not_finished_cannot_generate_yet(refusal, write_run, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "config.yaml").write_text(dump_run(load_run(write_run())))
    assert "this run has no export yet; let it finish" in refusal("generate", tmp_path / "output", "--prompt", "x")


@pytest.mark.parametrize(
    "arguments, said", [([], "required: COMMAND"), (["trian"], "invalid choice: 'trian'"), (["train"], "CONFIG")]
)
def test_what_is_no_command_is_refused(refusal, arguments, said):
    assert said in refusal(*arguments)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--help"], ["usage: llmtune", "train", "generate", "report"]),
        (
            ["train", "--help"],
            ["usage: llmtune train CONFIG.yaml [--section.key VALUE ...]", "optimizer.learning_rate"],
        ),
        (["generate", "--help"], ["usage: llmtune generate", "--prompt TEXT", "--max-new-tokens N"]),
        (["report", "--help"], ["usage: llmtune report", "--output FILE", "comparison-with-OTHER.html"]),
        (["--version"], [f"llmtune {llmtune.__version__}"]),
    ],
)
def test_help_and_version_are_said(capsys, monkeypatch, arguments, said):
    monkeypatch.setenv("COLUMNS", "200")  # else it depends on the terminal where a line breaks
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr()
    assert caught.value.code == 0 and printed.err == ""
    assert all(part in printed.out for part in said)


def test_the_help_of_train_lists_every_key(capsys):
    from llmtune.config import key_reference

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert all(f"  {path}  ({kind}; default {default})" in printed for path, kind, default, _ in key_reference())


def test_help_and_mistakes_in_the_configuration_do_not_wait_for_jax(write_run):
    arguments = [["--help"], ["train", "--help"], ["train", str(write_run(optimzer={}))]]
    script = f"""
import sys
from llmtune.cli import main
for arguments in {arguments!r}:
    try:
        main(arguments)
    except SystemExit:
        pass
assert not {{"jax", "flax", "tokenizers", "grain"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_prompts_are_printed_with_their_completions(capsys, starter):
    prompts = ["Mira the fox", "Name an animal:"]
    assert (
        main(["generate", "llmtune:starter", "--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", "4"])
        == 0
    )
    expected = llmtune.load(starter).generate(prompts, max_new_tokens=4)
    assert capsys.readouterr().out == "".join(f"{prompt}{own}\n" for prompt, own in zip(prompts, expected, strict=True))


def test_only_the_noise_of_a_failed_save_is_kept_from_stderr(monkeypatch):
    from llmtune.train_command import _print_unraisable

    printed = []
    monkeypatch.setattr(sys, "__unraisablehook__", printed.append)
    found = [SimpleNamespace(exc_value=RuntimeError(said)) for said in ("Event loop is closed", "a defect")]
    for one in found:
        _print_unraisable(one)
    assert printed == found[1:]


def test_what_takes_long_says_what_it_is_doing(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    assert main(["generate", "llmtune:starter", "--prompt", "Mira", "--max-new-tokens", "2"]) == 0
    printed = capfd.readouterr()
    assert "generating up to 2 tokens" in printed.err and printed.out.startswith("Mira")


def test_a_reader_who_has_read_enough_is_no_error():
    run = f"{sys.executable} -m llmtune.cli inspect llama3-8b"
    said = subprocess.run(["bash", "-c", f"({run}; echo $? >&2) | true"], capture_output=True, text=True)
    assert said.stderr.split() in (["141"], ["0"])  # 0 where everything fitted into the pipe before it closed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--processes", "two"], "'two' is no number of processes"),
        (["--processes", "2"], "--processes N needs --process I and --coordinator HOST:PORT"),
        (["--processes", "2", "--process", "2", "--coordinator", "localhost:1"], "--process: 2 must lie in 0..1"),
        (["--processes", "2", "--process", "1", "--coordinator", "localhost"], "'localhost' is not HOST:PORT"),
        (["--process", "0"], "belong to --processes N"),
        (["--supervise", "--processes", "auto"], "give their number, not auto"),
        (["--supervise", "--processes", "2", "--process", "0"], "--supervise chooses --process"),
        (["--checkpoint.retries", "-1"], "checkpoint.retries: -1 must be 0 or more"),
        (["--checkpoint.best.n", "0"], "checkpoint.best.n: 0 must be positive"),
        (["--checkpoint.best", "{}"], "eval_loss is not measured during training; set data.validation"),
        (["--safeguards.hang_seconds", "0"], "safeguards.hang_seconds: 0.0 must be positive"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(refusal, write_run, flags, said):
    assert said in refusal("train", write_run(), *flags)
