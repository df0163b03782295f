"""The page of a real run and the comparison of two: complete, self-contained, and harmless whatever a model says."""

import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import jax
import pytest

import llmtune
from llmtune.cli import main
from llmtune.evaluation.report import read_record, units, write_comparison, write_report
from llmtune.evaluation.report.spending import spending
from llmtune.evaluation.report.tables import differences
from llmtune.evaluation.report.verdict import judge
from tests.evaluation.runs import HOSTILE, PROMPTS, short_run
from tests.training.interruption import StoppingDisplay, train_until

NO_END = {"meta", "link", "br"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: directory}: one from start to end, one with another rate and longer rows cut, one interrupted after a checkpoint."""
    directory = tmp_path_factory.mktemp("runs")
    one = short_run(directory, "one")
    said = StoppingDisplay()
    llmtune.train(one, said, devices=jax.devices()[:1])
    assert f"report: {directory / 'one' / 'report.html'}" in said.text
    other = ["--optimizer.learning_rate", "1e-3", "--data.sequence_length", "40", "--data.too_long", "drop"]
    llmtune.train(short_run(directory, "other", other), devices=jax.devices()[:1])
    train_until(short_run(directory, "halted"), 6)
    return {path.name: path for path in directory.iterdir() if path.is_dir()}


@pytest.fixture
def copy(runs, tmp_path):
    """A run whose files a test may change."""
    return shutil.copytree(runs["one"], tmp_path / "copy")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.source, self.open, self.elements, self.words = text, [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in NO_END:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read_page(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(runs):
    return read_page(runs["one"] / "report.html")  # as training left it


def assert_self_contained(page):
    assert len(page.source.encode()) < 2_000_000
    assert "http:" not in page.source and "https:" not in page.source and "@import" not in page.source
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "base", "form", "video", "audio", "foreignobject"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "data", "srcset", "action"):
                assert value.startswith("#") or (tag, value) == ("link", "data:,"), (tag, name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page.source))
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and policies[0].startswith("default-src 'none'")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_needs_nothing_but_itself(page):
    assert_self_contained(page)


def test_the_page_shows_what_the_run_was(runs, page):
    record = read_record(runs["one"])
    counts = record.facts["data"]["train"]["counts"]
    session = record.sessions[0]
    assert page.text.count("Problem:") == 0
    for shown in (
        "Validation perplexity fell from", "95\N{NO-BREAK SPACE}%\N{NO-BREAK SPACE}CI", "the same examples compared",
        "Learning rate", "Gradient norm", "Tokens per second", "held out", "Before", "After", "Wall time", "Peak memory",
        f"{counts['tokens']:,}", f"{counts['targets']:,}", "Truncated", "Dropped", record.facts["data"]["sha256"],
        f"{record.facts['model']['parameters']:,}", "LlamaForCausalLM", session["versions"]["jax"], jax.devices()[0].device_kind,
        "Compiling the train step", "optimizer.learning_rate", "0.003", str(runs["one"]),
    ):  # fmt: skip
        assert " ".join(shown.split(" ")) in page.text.replace("\n", " ") or shown in page.source, shown
    for moment in ("before", "after"):
        for sample in record.samples(moment):
            assert " ".join(sample["completion"].split()) in page.text
    drawings = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        assert "var(--first)" in drawing and not re.search(r"#0101\d\d", drawing)
        texts = [element.text for element in ElementTree.fromstring(drawing).iter("text")]
        assert "step" in texts and len(texts) > 5  # text as text


def test_the_first_line_has_the_figures_of_evaluation_json(runs, page):
    evaluation = json.loads((runs["one"] / "evaluation.json").read_text())
    first = re.search(r'class="text">(.*?)</p>', page.source).group(1)
    told = [float(figure.replace(",", "")) for figure in re.findall(r"(?:from|to) ([\d,.]+)", first)]
    assert told == pytest.approx([evaluation[moment]["perplexity"] for moment in ("before", "after")], rel=0.01)


def test_hostile_text_stays_text(runs, page, copy):
    assert HOSTILE in page.text and HOSTILE not in page.source  # a prompt, by way of the configuration
    worse = HOSTILE + "\0\x1b[31m\ud800 {{ 7 * 7 }} &amp; <b>"

    def replace(evaluation):
        evaluation["after"]["samples"][0]["completion"] = worse

    edit(copy / "evaluation.json", replace)
    edit(copy / "run.json", lambda facts: facts["data"]["notes"].append(worse))
    edit(copy / "run.json", lambda facts: facts["model"].update(architecture=worse))
    for path in (write_report(copy), write_comparison(runs["one"], copy, copy / "both.html")):
        hostile = read_page(path)
        assert_self_contained(hostile)
        assert HOSTILE + "\N{SYMBOL FOR NULL}\N{SYMBOL FOR ESCAPE}[31m? {{ 7 * 7 }} &amp; <b>" in hostile.text
        assert HOSTILE not in hostile.source


def test_sources_of_the_data_are_shown_where_they_are_recorded(copy):
    source = {
        "name": "a.parquet",
        "sha256": "ab" * 32,
        "rows": 50,
        "skipped": {"no target": 2, "null": 3},
        "dropped": 1,
    }
    edit(copy / "run.json", lambda facts: facts["data"]["train"]["sources"].append(source))
    text = read_page(write_report(copy)).text
    assert "a.parquet Rows 50 Dropped 1 (2.0 %) Skipped 5 (10 %) no target 2; null 3 sha256 abababababababab" in text


def test_a_source_of_one_run_alone_is_one_line_of_the_comparison(runs, copy):
    source = {
        "name": "b.csv",
        "format": "text",
        "weight": 0.5,
        "counts": {"rows": 3},
        "skipped_first": ["b.csv:2: null"],
    }
    edit(copy / "run.json", lambda facts: facts["data"]["train"]["sources"].append(source))
    told = {name: (left, right) for name, left, right in differences(read_record(runs["one"]), read_record(copy))}
    assert told == {"Training: b.csv": ("\N{EM DASH}", "format text, weight 0.5, rows 3, sha256 ")}
    assert "Skipped, first ones b.csv:2: null" in read_page(write_report(copy)).text


def test_a_mixture_is_told_by_what_is_set():
    source = {"path": "a", "weight": 0.5, "format": None, "columns": {"text": "chosen"}}
    other = {"path": "b", "weight": 1.0, "format": None, "columns": None}
    assert units.listed([source, other, "c"]) == "a, weight: 0.5, columns: {text: chosen}\nb\nc"


def test_an_unfinished_run_says_so(runs, capsys):
    assert not (runs["halted"] / "report.html").exists()
    assert main(["report", str(runs["halted"])]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "! This run is not finished: step 6 of 12; it was interrupted. The same `llmtune train` command"
    )
    assert said.endswith(f"report: {runs['halted'] / 'report.html'}\n")
    page = read_page(runs["halted"] / "report.html")
    assert_self_contained(page)
    assert "Warning: This run is not finished: step 6 of 12" in page.text and "not sampled yet" in page.text


def test_a_run_without_a_step_and_without_facts_has_a_page(copy, tmp_path):
    for name in ("metrics.jsonl", "evaluation.json", "run.json", "held_out", "checkpoints", "export", "report.html"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["report", str(copy), "--output", str(tmp_path / "bare.html")]) == 0
    page = read_page(tmp_path / "bare.html")
    assert_self_contained(page)
    assert "No training step is recorded yet" in page.text and not (copy / "report.html").exists()


def test_two_runs_are_compared(runs, capsys, tmp_path):
    output = tmp_path / "both.html"
    assert main(["report", str(runs["one"]), str(runs["other"]), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "optimizer.learning_rate: '0.003' in A, '0.001' in B" in said and "adapt.rank" not in said
    page = read_page(output)
    assert_self_contained(page)
    for shown in (
        "A: one",
        "B: other",
        "optimizer.learning_rate 0.003 0.001",
        "data.too_long truncate drop",
        "What differs",
    ):
        assert shown in page.text, shown
    assert "they were measured on different examples" in page.text.lower()  # rows were dropped in one
    for name, moment in (("one", "before"), ("one", "after"), ("other", "after")):
        for sample in read_record(runs[name]).samples(moment):
            assert " ".join(sample["completion"].split()) in page.text
    drawings = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(drawings) == 4 and all("var(--second)" in drawing for drawing in drawings)


def test_a_run_and_its_copy_differ_in_nothing(runs, copy, capsys):
    assert main(["report", str(runs["one"]), str(copy)]) == 0
    said = capsys.readouterr().out
    assert "No measurable difference in validation perplexity after training" in said and "nothing differs" in said
    path = runs["one"] / "comparison-with-copy.html"
    assert said.endswith(f"report: {path}\n") and "Nothing: configuration, data, versions" in read_page(path).text


def test_a_finished_run_writes_its_page_again(runs):
    page = runs["one"] / "report.html"
    page.unlink()
    llmtune.train(llmtune.load_run(runs["one"] / "config.yaml"), devices=jax.devices()[:1])
    assert "interrupted and taken up" not in read_page(page).text
    assert [session["outcome"] for session in read_record(runs["one"]).sessions] == ["finished"] * 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["{tmp}/none"], "{tmp}/none: no such directory; give the `output` of a run"),
        (["{tmp}"], "{tmp}: no llmtune run (it has no config.yaml)"),
        (["{copy}", "{tmp}"], "{tmp}: no llmtune run (it has no config.yaml)"),
        (["{copy}", "{copy}", "{copy}"], "3 runs are given; give one, or two to compare"),
        (["{copy}", "--output", "{tmp}/none/page.html"], "{tmp}/none/page.html: the report cannot be written"),
    ],
)
def test_what_is_no_run_is_refused(copy, tmp_path, capsys, arguments, said):
    code = main(["report", *(argument.format(tmp=tmp_path, copy=copy) for argument in arguments)])
    error = capsys.readouterr().err
    assert code == 2 and said.format(tmp=tmp_path) in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "name, content, where",
    [
        ("run.json", b"{", "run.json"),
        ("evaluation.json", b"[1]", "evaluation.json"),
        ("metrics.jsonl", b'{"step": 1}\nnonsense\n', "metrics.jsonl:2"),
        ("config.yaml", b"- a\n", "config.yaml"),
        ("held_out/before.npy", b"nothing", "held_out/before.npy"),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl"),
    ],
)
def test_a_damaged_file_is_named(copy, capsys, name, content, where):
    (copy / name).write_bytes(content)
    assert main(["report", str(copy)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"llmtune: error: {copy / where}: ") and len(error.splitlines()) == 1


def test_a_long_run_has_a_small_page(copy):
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    many = ({**rows[step % 12], "step": step, "eval_loss": 2.0} for step in range(1, 20_001))
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    page = read_page(write_report(copy))
    assert_self_contained(page)
    assert len(page.source) < 200_000


def test_a_torn_last_line_is_left_out(copy):
    whole = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(whole + '{"step": 13, "lo')
    assert read_record(copy).last_step == 12


def mixture(copy):
    """The run as one of two sources, interrupted once, with samples on the way."""
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {
            "loss/code": row["loss"] + 1,
            "loss/law <b>": row["loss"] - 1,
            "grad_norm/mlp": 1.0,
            "grad_norm/head": 2.0,
        }
        row |= {"seconds": 2.0, "mfu": 0.413, "skipped": float(row["step"] == 3)}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = json.loads((copy / "run.json").read_text())
    session = facts["sessions"][-1] | {"compile_seconds": 5.0}
    first = {
        "started": "2026-01-01T00:00:00+00:00",
        "ended": None,
        "outcome": "running",
        "seconds": 15.0,
        "first_step": 0,
    }
    second = {
        "started": "2026-01-01T00:01:00+00:00",
        "ended": "2026-01-01T00:01:40+00:00",
        "seconds": 40.0,
        "first_step": 4,
    }
    facts["sessions"] = [session | first, session | second]
    (copy / "run.json").write_text(json.dumps(facts))
    sample = {"step": 4, "prompt": PROMPTS[0], "completion": "<i>half way</i>"}
    (copy / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return len(rows)


def test_a_mixture_an_interruption_and_samples_on_the_way_are_shown(copy):
    steps = mixture(copy)
    page = write_report(copy).read_text()
    for title in (
        "Training loss by source, running mean",
        "Gradient norm by part, running mean",
        "share of the chip&#39;s peak",
    ):
        assert title in page
    assert "law &lt;b&gt;" in page and "law <b>" not in page
    assert "Step 4" in page and "&lt;i&gt;half way&lt;/i&gt;" in page and "On the way: 1 more" in page
    assert "1 step changed nothing and was skipped, the first of them step 3." in page
    assert "taken up again after step 4" in page and "41.3%" in page
    time = spending(read_record(copy))
    assert (time.steps, time.compiling, time.wall, time.restarts) == (2.0 * steps, 10.0, 100.0, 1)
    assert time.other == 55.0 - 10.0 - 2.0 * steps and time.between == 45.0 and time.goodput == 2.0 * steps / 100
    assert f'<dt>Goodput</dt><dd class="value">{2 * steps}%</dd>' in page


def test_a_source_that_gets_worse_is_warned_of(copy):
    mixture(copy)
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["loss/code"] = 2.0 + 0.1 * row["step"]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [remark.text for remark in judge(read_record(copy))]
    assert any(text.startswith("The training loss of a source of the mixture rose: code (2.") for text in texts)
