"""Published rates: every chip is complete, within what its figures allow, and known by the name that jax gives it."""

from types import SimpleNamespace

import jax
import pytest
from jax._src.mesh_utils import _TPU_V4, _TPU_V5_LITE

from llmtune.chips import chip_of, chips


@pytest.mark.parametrize("name", chips())
def test_a_chip_is_complete(name):
    chip = chips()[name]
    assert chip.source.startswith("https://") and chip.links > 0 and chip.host_devices in (4, 8)
    assert 1e14 < chip.flops < 1e16 and 5e11 < chip.hbm_bandwidth < 2e13
    assert 15 * 2**30 <= chip.hbm_bytes < 2**38 and 1e10 < chip.link_bandwidth <= 1e11


def test_chips_are_found_by_the_names_that_jax_gives_them():
    kinds = [chip.kind for chip in chips().values()]
    assert len(set(kinds)) == len(kinds)
    assert {_TPU_V4, _TPU_V5_LITE, "TPU v5", "TPU v6 lite", "TPU7x", "NVIDIA H100 80GB HBM3", "NVIDIA H200"} <= set(
        kinds
    )
    assert chip_of(SimpleNamespace(device_kind=_TPU_V5_LITE)).flops == 197e12
    assert chip_of(jax.devices()[0]) is None
