"""A weight straight onto its devices: each reads its own slice from disk, a bounded piece at a time.

    disk  q_proj.weight of 32 layers, [out, in] each
      --> every device: an empty [32, in, out/8]; piece by piece, its part of a layer is read and written into it
No slice is ever held whole on the host, however few devices there are: the host holds one piece of one device.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints_convert.hf_names import Tensor
from checkpoints_convert.safetensors_reader import Slices, Weights

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
    stacked = parts[0].layer is not None
    full = (len(parts), *inner) if stacked else inner
    local = layout.shard_shape(full)
    pieces = list(_pieces(local, _disk_axis(parts[0]), stacked, dtype.itemsize))
    told = _Steps(sum(weights.tensors[tensor.name].nbytes for tensor in parts), len(pieces), progress)

    def put(piece: Bounds) -> jax.Array:
        """This piece of every device's slice, as an array in the same layout."""
        scale = [whole // own for whole, own in zip(full, local, strict=True)]
        shape = tuple((stop - start) * ways for (start, stop), ways in zip(piece, scale, strict=True))
        arrays = []
        for corner, devices in _slices(layout, full).items():
            at = tuple((first + start, first + stop) for first, (start, stop) in zip(corner, piece, strict=True))
            host = _read(weights, parts, at, dtype)
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


def _slices(layout: NamedSharding, full: tuple[int, ...]) -> dict[tuple[int, ...], list]:
    """The devices of this process by the corner at which their slice begins; those that hold the same share one reading."""
    found: dict[tuple[int, ...], list] = {}
    for device, index in layout.addressable_devices_indices_map(full).items():
        assert index is not None
        corner = tuple(own.indices(size)[0] for own, size in zip(index, full, strict=True))
        found.setdefault(corner, []).append(device)
    return found


def _pieces(shape: tuple[int, ...], axis: int, stacked: bool, itemsize: int) -> Iterator[Bounds]:
    """A slice cut into pieces: some layers each, or of one layer, runs along the axis that is the first on disk."""
    if math.prod(shape) * itemsize <= PIECE:
        yield tuple((0, size) for size in shape)
        return
    per_layer = math.prod(shape[1:] if stacked else shape) * itemsize
    cuts = [[(0, size)] for size in shape]
    if stacked:
        cuts[0] = _cut(shape[0], max(1, PIECE // max(1, per_layer)))
    if per_layer > PIECE:
        cuts[axis] = _cut(shape[axis], max(1, PIECE * shape[axis] // per_layer))
    yield from itertools.product(*cuts)


def _cut(size: int, step: int) -> list[tuple[int, int]]:
    return [(first, min(first + step, size)) for first in range(0, size, step)]


def _disk_axis(tensor: Tensor) -> int:
    """Which of our axes is the first on disk."""
    return (tensor.layer is not None) + (len(tensor.shape) - 1 if tensor.transposed else 0)


def _read(weights: Weights, parts: Sequence[Tensor], bounds: Bounds, dtype: np.dtype) -> np.ndarray:
    index = tuple(slice(*bound) for bound in bounds)
    out = np.empty([stop - start for start, stop in bounds], dtype)
    if parts[0].layer is None:
        out[...] = _read_tensor(weights, parts[0], index)
    else:
        for k, tensor in enumerate(parts[index[0]]):
            out[k] = _read_tensor(weights, tensor, index[1:])
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
