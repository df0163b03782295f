"""What is here runs on an NVIDIA GPU alone: `make gpu`."""

import pytest

from llmtune.kernels.platform import platform


@pytest.fixture(autouse=True)
def gpu():
    if platform() != "nvidia":
        pytest.skip("needs an NVIDIA GPU and JAX_PLATFORMS=cuda,cpu")
