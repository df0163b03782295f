"""Arrays of any sizes and kinds that two processes tell each other."""

import sys

from tests.processes import free_address, side_by_side

PROCESS = """
import sys
import jax, numpy as np
from llmtune.training import processes

index = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, index, cluster_detection_method="deactivate")
peers = processes.AllProcesses()
assert (peers.index, peers.count) == (index, 2)


def told(sizes, dtype):
    return [np.random.default_rng(size).integers(-100 if dtype == np.int32 else 0, 100, size, dtype) for size in sizes]


for piece in (64 << 20, 32, 8):
    processes.PIECE = piece
    for sizes in ((0, 0), (0, 3), (5, 0), (1, 1), (8, 8), (7, 40), (33, 2), (64, 9)):
        for dtype in (np.uint8, np.int32):
            arrays = told(sizes, dtype)
            found = peers.gather(arrays[index])
            for own, expected in zip(found, arrays, strict=True):
                assert own.dtype == dtype
                np.testing.assert_array_equal(own, expected, str((piece, sizes, dtype)))
print("all told")
"""


def test_what_two_processes_tell_each_other_arrives_whole():
    """All at once, in pieces, with pieces that are not filled, and nothing at all."""
    command, address = [sys.executable, "-c", PROCESS], free_address()
    codes, said = side_by_side([[*command, address, index] for index in range(2)])
    assert codes == [0, 0] and all("all told" in own for own in said), said
