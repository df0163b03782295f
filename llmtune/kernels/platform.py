"""The platform of the program being compiled: that of the mesh's devices, which need not be the machine that compiles."""

import jax

KNOWN = ("tpu", "nvidia")


def platform() -> str:
    """`tpu`, `nvidia` or `other` (CPUs, and GPUs that no back end of ours is made for)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = (jax.devices()[0] if device is None else device).device_kind.lower()
    return next((name for name in KNOWN if kind.startswith(name)), "other")
