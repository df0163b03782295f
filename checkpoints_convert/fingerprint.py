"""What identifies the weights of a directory, at the cost of reading a little of each tensor.

A sha256 over every tensor's name, dtype, shape and first and last 64 KiB. Training, merging or converting a model moves all of
its matrices, so another model does not have the same; hashing 140 GB in full before each start would take minutes. Shards are
left out: the same weights in other files are the same weights.
"""

import hashlib
import os
from pathlib import Path

from checkpoints_convert.safetensors_header import TensorInfo
from checkpoints_convert.safetensors_reader import open_directory

END = 64 * 1024  # bytes read at either end of a tensor


def fingerprint(directory: Path) -> str:
    """sha256 in hexadecimal. Raises LlmtuneFormatError like `open_directory`."""
    digest = hashlib.sha256()
    for name, info in sorted(open_directory(directory).tensors.items()):
        digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
        digest.update(_ends(info))
    return digest.hexdigest()


def _ends(info: TensorInfo) -> bytes:
    with info.file.open("rb", buffering=0) as file:
        if info.end - info.start <= 2 * END:
            return os.pread(file.fileno(), info.end - info.start, info.start)
        return os.pread(file.fileno(), END, info.start) + os.pread(file.fileno(), END, info.end - END)
