"""Arrays to a directory and back, by Orbax: the only module that knows it.

Its V1 interface is used (an attribute of `orbax.checkpoint`, the coming default), and of that only what writes and reads one
directory: which directories there are, and which of them count, is the business of the modules beside this one.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint

ocp = orbax.checkpoint.v1
ITEM = "state"


def start_writing(path: Path, arrays: dict[str, jax.Array]) -> Callable[[], None]:
    """Begin to write the arrays, which may be given away at once; what is returned waits for the end, or raises.

    To be called in all processes, each of which writes its part; the directory appears when all of them have. Nothing is
    compressed: of weights and moments that saves 8 % of the bytes for half of the CPU seconds of a save.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    with context:
        return ocp.save_checkpointables_async(str(path), {ITEM: arrays}, overwrite=True).result


def read(path: Path, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays, with the shapes, dtypes and shardings asked for."""
    return ocp.load_checkpointables(str(path), {ITEM: like})[ITEM]


def read_part(path: Path, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Of the arrays in the directory those that are asked for; the others are not read."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return read(path, like)
