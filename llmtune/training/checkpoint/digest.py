"""A digest of each array of a state that is the same on every mesh, computed where the array lies.

    array  -->  its words, each mixed with its place in the whole array  -->  two sums modulo 2^32

A sum does not care in which order, on which device or in which process its terms are formed. The mixing is a bijection of the
word (the finalizer of MurmurHash3, Appleby 2011), so that any change of one element changes the first sum for certain, and a
change of several is missed with a chance of 2^-64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmtune.training.host_memory import KIND

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
PLACE, FIRST, SECOND, OTHER = (np.uint32(c) for c in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F))


def digests(arrays: Any) -> Any:
    """A tree of arrays -> a tree of uint32 [2], the same on every device.

    Those that wait in the host's memory come one at a time, each in a program of its own: the device need not hold them all.
    """
    leaves, structure = jax.tree.flatten(arrays)
    here = [None if leaf.sharding.memory_kind == KIND else leaf for leaf in leaves]
    found = [_of_one(leaf) if own is None else of for leaf, own, of in zip(leaves, here, _of_all(here), strict=True)]
    return jax.tree.unflatten(structure, found)


@jax.jit
def _of_all(arrays: list[jax.Array | None]) -> list[jax.Array | None]:
    return [None if array is None else _digest(array) for array in arrays]


@jax.jit
def _of_one(array: jax.Array) -> jax.Array:
    return _digest(jax.device_put(array, jax.memory.Space.Device))


def to_text(digest: Any) -> str:
    """uint32 [2] -> 16 hexadecimal digits."""
    return "".join(f"{int(part):08x}" for part in np.asarray(digest))


def _digest(array: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(array, WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    mixed = words + _places(array) * PLACE
    for shift, factor in ((16, FIRST), (13, SECOND)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed ^= mixed >> 16
    other = (mixed ^ (mixed >> 15)) * OTHER
    return jnp.stack([jnp.sum(own, dtype=jnp.uint32) for own in (mixed, other ^ (other >> 13))])


def _places(array: jax.Array) -> jax.Array:
    """The index of each element in the flattened array, modulo 2^32, laid out like the array."""
    sharding = jax.typeof(array).sharding
    places, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        own = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis, out_sharding=sharding)
        places, stride = places + own * np.uint32(stride % 2**32), stride * array.shape[axis]
    return places
