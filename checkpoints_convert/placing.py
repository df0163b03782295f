"""A weight straight onto its devices: each reads its own slice from disk, a bounded piece at a time.

    disk  q_proj.weight of 32 layers, [out, in] each
      --> every device: an empty [32, in, out/8]; piece by piece, its part of a layer is read and written into it
No slice is ever held whole on the host, however few devices there are: the host holds one piece of one device.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints_convert.hf_names import Tensor
from checkpoints_convert.safetensors_reader import Slices, Weights
from llmtune.weights import Quantized

PIECE = 8 * 1024 * 1024  # bytes on the host at a time
Bounds = tuple[tuple[int, int], ...]
Progress = Callable[[int], None]


def place(
    weights: Weights, parts: Sequence[Tensor], layout: NamedSharding, dtype: np.dtype, progress: Progress
) -> jax.Array:
    """The weight that `parts` stack up to (or the one tensor that it is), in `dtype`, laid out as `layout`.

    `progress` hears of the weight's bytes on disk, in steps that add up to them whatever this process reads of it.
    """
    inner = parts[0].shape[::-1] if parts[0].transposed else parts[0].shape
    lead = tuple(last + 1 for last in parts[-1].index)  # (), (layers,) or (layers, experts): parts are in this order
    places, full = np.arange(len(parts)).reshape(lead), (*lead, *inner)
    local = layout.shard_shape(full)
    pieces = list(_pieces(local, (*range(len(lead)), _disk_axis(parts[0], len(lead))), dtype.itemsize))
    told = _Steps(sum(weights.tensors[tensor.name].nbytes for tensor in parts), len(pieces), progress)

    def put(piece: Bounds) -> jax.Array:
        """This piece of every device's slice, as an array in the same layout."""
        scale = [whole // own for whole, own in zip(full, local, strict=True)]
        shape = tuple((stop - start) * ways for (start, stop), ways in zip(piece, scale, strict=True))
        arrays = []
        for corner, devices in _slices(layout, full).items():
            at = tuple((first + start, first + stop) for first, (start, stop) in zip(corner, piece, strict=True))
            host = _read(weights, parts, places, at, dtype)
            arrays += [jax.block_until_ready(jax.device_put(host, device)) for device in devices]
        told()
        return jax.make_array_from_single_device_arrays(shape, layout, arrays)

    if len(pieces) == 1:
        return put(pieces[0])
    array = _empty(full, dtype.name, layout)
    for piece in pieces:
        array = _writer(layout)(array, put(piece), tuple(np.int32(start) for start, _ in piece))
        jax.block_until_ready(array)
    return array


def place_encoded(
    weights: Weights,
    parts: Sequence[Tensor],
    declared: Quantized,
    layouts: Quantized,
    dtype: np.dtype,
    progress: Progress,
) -> Quantized:
    """The same weight, kept as codes: each layer is placed, encoded and written into the stack before the next is read.

    `declared`: its fields (`ArraySpec`), `layouts`: theirs. Beside the codes, one layer of this one weight is held.
    """
    if parts[0].layer is None:
        return _encoder(declared, layouts)(place(weights, parts, layouts.matrix_layout, dtype, progress))
    stack = jax.tree.map(lambda spec, own: _empty(spec.shape, spec.dtype, own), declared, layouts)
    layout = layouts.matrix_layout
    one_layer = NamedSharding(layout.mesh, PartitionSpec(*layout.spec[1:]))
    for layer, of_layer in itertools.groupby(parts, key=lambda part: part.layer):
        matrix = place(weights, [replace(part, layer=None) for part in of_layer], one_layer, dtype, progress)
        stack = _layer_encoder(declared, layouts)(stack, matrix, layer)
        jax.block_until_ready(stack)
    return stack


@functools.lru_cache(maxsize=64)
def _encoder(declared: Quantized, layouts: Quantized) -> Callable[..., Quantized]:
    return jax.jit(declared.encode, out_shardings=layouts)


@functools.lru_cache(maxsize=64)
def _layer_encoder(declared: Quantized, layouts: Quantized) -> Callable[..., Quantized]:
    """(stack of codes, one layer's matrix, which layer) -> the stack with its codes in place, in the same memory."""

    def insert(stack: jax.Array, new: jax.Array, layer: jax.Array, layout: NamedSharding) -> jax.Array:
        write = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
        inner, none = PartitionSpec(*layout.spec[1:]), PartitionSpec()
        return jax.shard_map(write, mesh=layout.mesh, in_specs=(layout.spec, inner, none), out_specs=layout.spec)(
            stack, new, layer
        )

    def encode(stack: Quantized, matrix: jax.Array, layer: jax.Array) -> Quantized:
        codes = declared.encode(matrix)
        return jax.tree.map(lambda own, new, layout: insert(own, new, layer, layout), stack, codes, layouts)

    return jax.jit(encode, donate_argnums=0)


def _slices(layout: NamedSharding, full: tuple[int, ...]) -> dict[tuple[int, ...], list]:
    """The devices of this process by the corner at which their slice begins; those that hold the same share one reading."""
    found: dict[tuple[int, ...], list] = {}
    for device, index in layout.addressable_devices_indices_map(full).items():
        assert index is not None
        corner = tuple(own.indices(size)[0] for own, size in zip(index, full, strict=True))
        found.setdefault(corner, []).append(device)
    return found


def _pieces(shape: tuple[int, ...], axes: tuple[int, ...], itemsize: int) -> Iterator[Bounds]:
    """A slice cut into pieces, along as few of `axes` as it takes: layers, experts, and what is the first axis on disk."""
    cuts, nbytes = [[(0, size)] for size in shape], math.prod(shape) * itemsize
    for axis in axes:
        if nbytes <= PIECE:
            break
        step = max(1, PIECE * shape[axis] // nbytes)
        cuts[axis] = _cut(shape[axis], step)
        nbytes = nbytes // shape[axis] * step
    yield from itertools.product(*cuts)


def _cut(size: int, step: int) -> list[tuple[int, int]]:
    return [(first, min(first + step, size)) for first in range(0, size, step)]


def _disk_axis(tensor: Tensor, lead: int) -> int:
    """Which of our axes is the first on disk."""
    return lead + (len(tensor.shape) - 1 if tensor.transposed else 0)


def _read(weights: Weights, parts: Sequence[Tensor], places: np.ndarray, bounds: Bounds, dtype: np.dtype) -> np.ndarray:
    """A piece of the stack; `places` has its leading axes, and says which part is where."""
    index = tuple(slice(*bound) for bound in bounds)
    chosen = places[index[: places.ndim]]
    out = np.empty([stop - start for start, stop in bounds], dtype)
    for corner in np.ndindex(chosen.shape):
        out[corner] = _read_tensor(weights, parts[int(chosen[corner])], index[places.ndim :])
    return out


def _read_tensor(weights: Weights, tensor: Tensor, index: Slices) -> np.ndarray:
    array = weights.read_slice(tensor.name, index[::-1] if tensor.transposed else index)
    return array.T if tensor.transposed else array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(shape: tuple[int, ...], dtype: str, layout: NamedSharding) -> jax.Array:
    return jnp.zeros(shape, dtype, out_sharding=layout)


@functools.lru_cache(maxsize=64)
def _writer(layout: NamedSharding) -> Callable[..., jax.Array]:
    """(array, piece of each device's slice, corner in that slice) -> the array with the pieces in place, in the same memory."""
    spec = layout.spec
    write = jax.shard_map(
        jax.lax.dynamic_update_slice, mesh=layout.mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec
    )
    return jax.jit(write, donate_argnums=0)


class _Steps:
    """Tells `progress` of `total` bytes in `count` steps, whole numbers that add up."""

    def __init__(self, total: int, count: int, progress: Progress):
        self._total, self._count, self._progress, self._done = total, count, progress, 0

    def __call__(self) -> None:
        before, self._done = self._done, self._done + 1
        self._progress(self._total * self._done // self._count - self._total * before // self._count)
