"""Eight simulated devices on the CPU (or what a preset JAX_PLATFORMS names), and the real assets where they are at hand."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # cuda,cpu: `make gpu`
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
COMPILED = tempfile.TemporaryDirectory(prefix="llmtune-tests-")  # programs that several tests run are compiled once
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real models, tokenizers and data, kept beside the checkout; tests that need them skip elsewhere."""
    path = ROOT.parent / "shared" / "assets"
    if not path.is_dir():
        pytest.skip("the shared assets are not beside this checkout")
    return path


@pytest.fixture(scope="session")
def stories(assets) -> Path:
    """A real trained Llama of 260,000 parameters."""
    return assets / "models" / "stories260K"


@pytest.fixture(scope="session")
def starter() -> Path:
    """The embedded model: always at hand."""
    return ROOT / "llmtune" / "starter"


@pytest.fixture(scope="session")
def batches(assets):
    """(tokens, labels), int [20, 4, 64]."""
    from tests.runs import fixed_batches

    return fixed_batches(assets)
