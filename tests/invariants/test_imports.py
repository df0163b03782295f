"""Imports point one way: who may stand on whom, read from the syntax trees, and what an import costs."""

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llmtune
from llmtune.model import Model
from llmtune.tokenizers import load_tokenizer
from tests.conftest import ROOT

FILES = sorted(path for package in ("llmtune", "checkpoints_convert") for path in (ROOT / package).rglob("*.py"))
STANDS_ON = {  # room -> the rooms that it may import, besides itself and llmtune.errors
    "llmtune.kernels": {"llmtune.sharding"},
    "llmtune.weights": {"llmtune.kernels", "llmtune.sharding"},
    "llmtune.models": {"llmtune.kernels", "llmtune.weights", "llmtune.sharding"},
    "llmtune.transforms": {"llmtune.weights", "llmtune.sharding"},
    "llmtune.optimizers": {"llmtune.config", "llmtune.weights", "llmtune.sharding"},
    "llmtune.objectives": {"llmtune.kernels", "llmtune.weights", "llmtune.sharding"},
    "checkpoints_convert": {"llmtune.models", "llmtune.weights"},
}
COMPOSERS = {
    "llmtune.training",
    "llmtune.planning",
    "llmtune.plan_command",
    "llmtune.train_command",
    "llmtune.cli",
    "llmtune",
}  # who may import llmtune.training
PORT = "llmtune.pretrained"
FOREIGN = {
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "tensorflow",
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
}
DISTRIBUTIONS = {"yaml": "pyyaml", "orbax": "orbax-checkpoint"}  # where the import has another name


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imports(module: str) -> set[str]:
    """The modules that it imports anywhere, those in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide what stands on what"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in inner}
    return found


def room(module: str) -> str:
    """`llmtune.training.loop` -> `llmtune.training`; `checkpoints_convert.peft` -> `checkpoints_convert`."""
    return module.split(".")[0] if not module.startswith("llmtune.") else ".".join(module.split(".")[:2])


EDGES = {(module, used) for module in MODULES for used in imports(module)}
OURS = {(module, used) for module, used in EDGES if used.split(".")[0] in ("llmtune", "checkpoints_convert")}


def test_sharding_imports_nothing_of_ours():
    assert not [edge for edge in OURS if room(edge[0]) == "llmtune.sharding" != room(edge[1])]


@pytest.mark.parametrize("name", list(STANDS_ON))
def test_a_room_stands_only_on_what_the_design_says(name):
    allowed = STANDS_ON[name] | {name, "llmtune.errors"}
    assert any(room(module) == name for module in MODULES)
    assert not [edge for edge in OURS if room(edge[0]) == name and room(edge[1]) not in allowed]


def test_nothing_below_stands_on_training():
    assert not [edge for edge in OURS if room(edge[1]) == "llmtune.training" and room(edge[0]) not in COMPOSERS]


def test_no_two_rooms_stand_on_each_other():
    edges = {(room(one), room(other)) for one, other in OURS if one != "llmtune"} - {("llmtune.cli", "llmtune")}
    edges = {(one, other) for one, other in edges if one != other}
    while edges:  # peel off the rooms that nobody stands on
        used = {other for _, other in edges}
        left = {(one, other) for one, other in edges if one in used}
        assert left != edges, f"a cycle among {sorted(left)}"
        edges = left


def test_one_port_to_other_peoples_formats():
    inside = {room(module) for module, used in OURS if room(used) == "checkpoints_convert" != room(module)}
    assert inside == {PORT}


def test_one_module_knows_orbax():
    assert {module for module, used in EDGES if used.split(".")[0] == "orbax"} == {"llmtune.training.checkpoint.arrays"}


def test_no_other_framework_and_no_pickle():
    assert not [edge for edge in EDGES if edge[1].split(".")[0] in FOREIGN]


UNSAFE = {"eval", "exec", "compile", "__import__", "os.system", "yaml.unsafe_load", "yaml.full_load", "pickle.load"}


def test_nothing_is_evaluated_or_loaded_as_code():
    calls = [(m, ast.unparse(n.func)) for m, tree in MODULES.items() for n in ast.walk(tree) if isinstance(n, ast.Call)]
    assert not [call for call in calls if call[1] in UNSAFE]
    assert {module for module, function in calls if function == "yaml.load"} <= {"llmtune.config.file"}  # StrictLoader
    assert not [module for module, tree in MODULES.items() if "trust_remote_code" in ast.unparse(tree)]


def test_every_import_is_of_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^A-Za-z0-9_-]", line)[0].replace("_", "-") for line in project["dependencies"]}
    used = {used.split(".")[0] for _, used in EDGES} - set(sys.stdlib_module_names) - {"llmtune", "checkpoints_convert"}
    assert {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in used} <= declared


FORKED = """
import os, sys, time, warnings
warnings.simplefilter("ignore")
import flax.nnx, grain, jax, jax.numpy, numpy, optax, orbax.checkpoint, pydantic, rich, sentencepiece, tokenizers, yaml
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            __import__(name)
        except BaseException as error:
            print(f"{name}: {error!r}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_every_module_can_be_the_first_to_be_imported():
    """Both packages in either order, and any module of theirs before all others; a fork each saves importing jax anew."""
    done = python("-c", FORKED, *(name for name in MODULES if not name.endswith("__main__")))
    assert done.stdout == "" and done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    "work",
    [
        "import llmtune",
        "import llmtune, checkpoints_convert; dir(llmtune); llmtune.LlmtuneError",
        "from llmtune.cli import main; main(['--help'])",
        "from llmtune.cli import main; main(['train', '--help'])",
        "from llmtune.cli import main; main(['generate', '--help'])",
        "from llmtune.cli import main; main(['generate'])",
        "from llmtune.cli import main; main(['report', '--help'])",
    ],
)
def test_asking_costs_nothing(work):
    """No jax, no flax, no numpy until there is something to compute."""
    heavy = "print({'jax', 'flax', 'numpy', 'optax', 'orbax'} & set(sys.modules), file=sys.stderr)"
    code = f"import sys\ntry:\n    {work}\nexcept SystemExit:\n    pass\nfinally:\n    {heavy}"
    assert python("-c", code).stderr.splitlines()[-1] == "set()"


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT.parent
    )


# --- the public surface -------------------------------------------------------------------------------------------


def load(path, *, adapters=(), dtype="float32", strategy=None): ...


def logits(self, tokens, *, positions=None, segment_ids=None): ...


def generate(self, prompts, *, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop=(), seed=0): ...


def save(self, path, *, dtype=None): ...


def save_adapter(self, path): ...


def encode(text, *, bos=True, allow_special=False): ...


def decode(ids): ...


def parameters(function) -> list[tuple]:
    return [(own.name, own.kind, own.default) for own in inspect.signature(function).parameters.values()]


def test_the_public_surface_is_what_the_design_promises(starter):
    assert parameters(llmtune.load) == parameters(load)
    for promised in (logits, generate, save, save_adapter):
        assert parameters(getattr(Model, promised.__name__)) == parameters(promised), promised.__name__
    model = llmtune.load(starter)
    assert isinstance(model.params, dict) and model.config.eos_token_ids and model.tokenizer is not None
    tokenizer = load_tokenizer(starter)
    assert parameters(tokenizer.encode) == parameters(encode) and parameters(tokenizer.decode) == parameters(decode)
    assert isinstance(tokenizer.bos_id, int) and tokenizer.eos_ids == model.config.eos_token_ids
    assert {"load", "Model", "LlmtuneError", "train", "load_run", "Run", "__version__"} <= set(dir(llmtune))
    assert all(getattr(llmtune, name) is not None for name in llmtune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'loads'"):
        _ = llmtune.loads
