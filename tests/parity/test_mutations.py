"""Seeded faults: each is put into a copy of the sources, and a named test must notice.

The faults are those that other projects shipped silently. The copy is run in a process of its own; without a fault all named
tests pass in it, so that a failure is the fault's.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.conftest import ROOT

LOGITS, GRADIENTS = "tests/parity/test_logits.py", "tests/parity/test_gradients.py"
GENERATION, ROUNDTRIP = "tests/parity/test_generation.py", "tests/parity/test_roundtrip.py"


@dataclass(frozen=True)
class Fault:
    """`old` stands exactly once in `file`; `test` is the one that must fail once it is `new`."""

    file: str
    old: str
    new: str
    test: str


def logits(model: str, kind: str = "plain") -> str:
    return f"{LOGITS}::test_{kind}[{model}]"


FAULTS = {
    "rows of Q and K in the other order": Fault(
        "llmtune/models/rope.py", "first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)",
        "first, second = x.astype(jnp.float32)[..., ::2], x.astype(jnp.float32)[..., 1::2]", logits("gqa untied"),
    ),
    "gate and up exchanged": Fault(
        "llmtune/models/mlp.py", "swiglu(gate, up)", "swiglu(up, gate)",
        logits("gqa untied"),
    ),
    "gate and up of experts exchanged": Fault(
        "checkpoints_convert/hf_names.py", '"mlp/experts/gate/kernel": "w1.weight",\n    "mlp/experts/up/kernel": "w3.weight"',
        '"mlp/experts/gate/kernel": "w3.weight",\n    "mlp/experts/up/kernel": "w1.weight"', logits("mixtral"),
    ),
    "window off by one": Fault(
        "llmtune/kernels/masks.py", "seen &= ahead < mask.window", "seen &= ahead <= mask.window",
        logits("mistral with a window"),
    ),
    "no window": Fault(
        "llmtune/models/language_model.py", "window=layer.window", "window=None", logits("mistral with a window"),
    ),
    "windows of the wrong layers": Fault(
        "llmtune/models/decoder.py", "slots = [(first + n) % period", "slots = [(first + n + 1) % period",
        logits("ministral, interleaved windows"),
    ),
    "ring of one token too many": Fault(
        "llmtune/generation/cache.py", "min(length, window or length)", "min(length, (window or length) + 1)",
        f"{GENERATION}::test_continuations_across_the_edge_of_the_window[mistral with a window]",
    ),
    "ring filled without its offset": Fault(
        "llmtune/generation/cache.py", "seq % held", "0",
        f"{GENERATION}::test_continuations_across_the_edge_of_the_window[mistral with a window]",
    ),
    "no rope scaling": Fault(
        "llmtune/models/rope.py", "return _scaled(rope.scaling, base, rope.theta)", "return base",
        logits("llama3 scaling beyond the original length"),
    ),
    "YaRN without its amplitude": Fault(
        "llmtune/models/rope.py", "return growth + 1.0", "return 1.0", logits("yarn scaling"),
    ),
    "queries not scaled by position": Fault(
        "llmtune/models/rope.py", "jnp.log1p(multiples", "0.0 * jnp.log1p(multiples", logits("ministral 3"),
    ),
    "wrong theta": Fault("checkpoints_convert/hf_rope.py", "return Rope(base, ", "return Rope(theta, ", logits("theta")),
    "wrong eps": Fault(
        "llmtune/models/norm.py", "+ self.eps)", "+ 1e-5)", logits("an eps that matters"),
    ),
    "heads grouped as if repeated the other way": Fault(
        "llmtune/kernels/strip_attention.py", "kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)",
        "heads // kv_heads, kv_heads, size).transpose(0, 3, 2, 1, 4)", logits("gqa untied"),
    ),
    "head_dim computed instead of read": Fault(
        "checkpoints_convert/hf_config.py", 'head_dim = positive(config, "head_dim", where, derived)', "head_dim = derived",
        logits("head_dim unlike hidden / heads"),
    ),
    "a second softmax in the router": Fault(
        "llmtune/models/moe.py", "probabilities = jax.nn.softmax(logits, axis=-1)",
        "probabilities = jax.nn.softmax(jax.nn.softmax(logits, axis=-1), axis=-1)", logits("mixtral"),
    ),
    "no renormalisation of the chosen": Fault(
        "llmtune/models/moe.py", "weights = weights / weights.sum(axis=-1, keepdims=True)", "weights = weights * 1.0",
        logits("mixtral"),
    ),
    "padding counted in the router's loss": Fault(
        "llmtune/models/language_model.py", "(segment_ids > 0).astype(jnp.float32)", "(segment_ids >= 0).astype(jnp.float32)",
        f"{GRADIENTS}::test_router_losses_with_padding_left_out",
    ),
    "no router loss in training": Fault(
        "llmtune/objectives/language_modeling.py", 'cross_entropy + weight * aux["penalty"]', "cross_entropy",
        f"{GRADIENTS}::test_router_losses_with_padding_left_out",
    ),
    "transposed o_proj": Fault(
        "checkpoints_convert/hf_names.py", 'layer, ours.endswith("kernel"))',
        'layer, ours.endswith("kernel") and "/o/" not in ours)', logits("gqa untied"),
    ),
    "biases read and forgotten": Fault(
        "llmtune/models/linear.py", "return out if bias is None else add_bias(out, bias)", "return out", logits("biases"),
    ),
    "tied head that does not train": Fault(
        "llmtune/models/decoder.py", "Tied(self.embed.table.get_value())",
        "Tied(jax.lax.stop_gradient(self.embed.table.get_value()))", f"{GRADIENTS}::test_every_parameter[tied]",
    ),
    "untied head": Fault(
        "llmtune/models/decoder.py", "return Tied(self.embed.table.get_value()) if kernel is None else kernel",
        "return Tied(self.embed.table.get_value())", logits("gqa untied"),
    ),
    "documents that see each other": Fault(
        "llmtune/kernels/masks.py", "(q_segments[:, :, None] == kv_segments[:, None, :]) &", "(kv_segments[:, None, :] > 0) &",
        logits("gqa untied", "packed_documents_see_only_themselves"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The sources and the tests, to be changed."""
    target = tmp_path_factory.mktemp("mutated") / "checkout"
    target.mkdir()
    for name in ("llmtune", "checkpoints_convert", "tests", "configs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def run_tests(copy, tests):
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def test_every_fault_is_one_that_can_be_put_in():
    for name, fault in FAULTS.items():
        assert (ROOT / fault.file).read_text().count(fault.old) == 1, name
        function = fault.test.partition("::")[2].partition("[")[0]
        assert f"def {function}(" in (ROOT / fault.test.partition("::")[0]).read_text(), name


@pytest.mark.nightly
def test_without_a_fault_all_named_tests_pass(copy):
    done = run_tests(copy, sorted({fault.test for fault in FAULTS.values()}))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_is_noticed(copy, name):
    fault = FAULTS[name]
    file, sound = copy / fault.file, (copy / fault.file).read_text()
    file.write_text(sound.replace(fault.old, fault.new))
    try:
        done = run_tests(copy, [fault.test])
    finally:
        file.write_text(sound)
    noticed = (
        "1 failed" in done.stdout or "1 error" in done.stdout
    )  # an error where the model is already refused on loading
    assert done.returncode == 1 and noticed, f"{name}: not noticed\n{done.stdout[-2000:]}"
