"""What Orbax alone leaves in memory: the arrays of a checkpoint, saved again and again, and nothing else.

python -m tests.reliability.bare_saves CHECKPOINT SAVES     prints the KB that a save leaves behind

TensorStore's conversions of JSON to Python never free a list. Five lines show it (`gc` counts 6 lists a call, 2 KB):

    import gc, tensorstore as ts
    metadata = {"shape": [3, 4], "chunks": [3, 4], "dtype": "<f4"}
    spec = ts.Spec({"driver": "zarr", "kvstore": {"driver": "memory"}, "metadata": metadata})
    for _ in range(1000): spec.to_json()
    gc.collect(), sum(isinstance(own, list) for own in gc.get_objects())
"""

import gc
import json
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmtune.training.checkpoint import arrays
from llmtune.training.meter import memory_in_use


def main(checkpoint, saves):
    step, one = Path(checkpoint), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(tuple(own["shape"]), jnp.dtype(own["dtype"]), sharding=one)
        for name, own in json.loads((step / "MANIFEST.json").read_text())["arrays"].items()
    }
    state, held = arrays.read(step, like), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(int(saves)):
            arrays.start_writing(Path(folder) / str(number), state)()
            shutil.rmtree(Path(folder) / str(number))
            held.append(memory_in_use()["host_bytes"] / 1e3)
    gc.collect()
    late = np.arange(len(held) // 4, len(held))
    print(float(np.polyfit(late, np.array(held)[late], 1)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
