"""One of several processes that train the same runs, one after the other, and tell what each of them read.

python -m tests.multihost.process HOST:PORT PROCESSES INDEX OUT CONFIG.yaml [CONFIG.yaml ...]
"""

import json
import sys
from pathlib import Path

import jax

import llmtune
from checkpoints_convert.safetensors_reader import WeightDirectory
from llmtune.data import BatchSource, sources


def watch():
    """What is read from now on: bytes of weights before the first batch, rows of files, and rows of global batches."""
    seen = {"weight_bytes": 0, "rows": [], "file_rows": []}
    fit_examples = sources.fit
    read_slice, read_batch = WeightDirectory.read_slice, BatchSource.__getitem__

    def weights(self, name, index):
        part = read_slice(self, name, index)
        seen["weight_bytes"] += 0 if seen["rows"] else part.nbytes
        return part

    def batch(self, step):
        own = read_batch(self, step)
        seen["rows"].append((int(step), list(self.share), [row.tolist() for row in own["tokens"]]))
        return own

    def fit(examples, *limits):
        def watched():
            for example in examples:
                seen["file_rows"].append(str(example.where))
                yield example

        return fit_examples(watched(), *limits)

    sources.fit = fit
    WeightDirectory.read_slice, BatchSource.__getitem__ = weights, batch
    return seen


def main(address, processes, index, out, *configs):
    jax.distributed.initialize(address, int(processes), int(index), cluster_detection_method="deactivate")
    seen, told = watch(), []
    for config in configs:
        seen |= {"weight_bytes": 0, "rows": [], "file_rows": []}
        llmtune.train(llmtune.load_run(config))
        told.append(dict(seen))
    Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
