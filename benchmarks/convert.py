"""A synthetic checkpoint in the shape of Llama 3.1 8B, converted and resharded: peak memory, and throughput beside `cp`.

    python -m benchmarks.convert [--layers 32] [--directory DIR]
Meta -> Hugging Face -> Meta in two tensor-parallel files -> Hugging Face in other shards; each step is `llmtune convert` in a
process of its own, whose VmHWM is read as it ends, and beside each `cp -r` of its source with a `sync`, in the same minutes.
At the end the last result is compared with the first, byte by byte. Everything is deleted again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from checkpoints_convert.hf_config import parse_model_config
from checkpoints_convert.hf_names import tensors
from checkpoints_convert.layouts import as_original, open_layout
from checkpoints_convert.original_names import original_name
from checkpoints_convert.original_params import Known, meta_to_hf
from checkpoints_convert.safetensors_reader import open_directory
from checkpoints_convert.safetensors_writer import Entry
from checkpoints_convert.torch_file import write_torch_file

PARAMS = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 8.0,
}  # fmt: skip
MEASURED = """
import sys
from llmtune.cli import main
code = main(sys.argv[1:])
print("VmHWM", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


def write_source(directory: Path, layers: int) -> None:
    """Random bfloat16 numbers in Meta's layout, in one file."""
    params = {**PARAMS, "n_layers": layers}
    config = parse_model_config(meta_to_hf(params, Known("bfloat16", 128256, False, None), "params"), None, "params")
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(params))
    draw = np.random.default_rng(0)

    def pieces(shape: tuple[int, ...]):
        for first in range(0, shape[0], 1024):
            rows = (min(1024, shape[0] - first), *shape[1:])
            bits = draw.integers(0, 2**16, rows, dtype=np.uint16) & np.uint16(0xBFFF)  # no infinities, no NaNs
            yield bits.view(ml_dtypes.bfloat16)

    entries = [
        Entry(str(original_name(t.name)), np.dtype(ml_dtypes.bfloat16), t.shape, lambda shape=t.shape: pieces(shape))
        for t in tensors(config)
    ]
    write_torch_file(directory / "consolidated.00.pth", entries)


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def copied(source: Path, target: Path) -> float:
    """Seconds of `cp -r` and a sync of what it wrote."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    took = time.perf_counter() - began
    shutil.rmtree(target)
    return took


def converted(source: Path, target: Path, *options: str) -> tuple[float, int]:
    """(seconds with the start of the interpreter, bytes of VmHWM)."""
    began = time.perf_counter()
    command = [sys.executable, "-c", MEASURED, "convert", str(source), str(target), *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    took = time.perf_counter() - began
    return took, 1024 * int(done.stdout.split("VmHWM")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--directory", default=None, help="on the disk to measure; default: the temporary one")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.directory, prefix="llmtune-convert-"))
    try:
        measure(work, options.layers)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(work: Path, layers: int) -> None:
    free = shutil.disk_usage(work).free
    write_source(work / "meta", layers)
    size = size_of(work / "meta")
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(f"source: {size / 1e9:.2f} GB, {layers} layers, bfloat16, Meta's layout; {free / 1e9:.0f} GB of disk free")
    print(f"load average {load:.1f} on {cores} cores", flush=True)
    steps = [
        ("Meta -> Hugging Face", "meta", "hf", ["--max-shard-size", "5GB"]),
        ("Hugging Face -> Meta, 2 files", "hf", "meta2", ["--to", "meta", "--files", "2"]),
        ("Meta, 2 files -> Hugging Face", "meta2", "again", ["--max-shard-size", "2GB"]),
        ("resharded to 1 GB", "again", "last", ["--max-shard-size", "1GB"]),
    ]
    for title, source, target, more in steps:
        cp = copied(work / source, work / "copy")
        took, peak = converted(work / source, work / target, *more)
        print(
            f"{title:32s} {took:6.1f} s, {size / took / 1e6:6.0f} MB/s; cp {cp:6.1f} s, {size / cp / 1e6:6.0f} MB/s; "
            f"ratio {cp / took:.2f}; VmHWM {peak / 1e9:.2f} GB",
            flush=True,
        )
        if source != "meta":
            shutil.rmtree(work / source)
    same = compare(work / "meta", work / "last")
    print(f"the last equals the first: {same} tensors, bit by bit")


def compare(meta: Path, hf: Path) -> int:
    one = open_layout(meta).own.tensors
    opened = open_layout(hf)
    other = as_original(opened.weights, opened.config, tied_head=True).tensors
    assert set(one) == set(other) and len(open_directory(hf).tensors) == len(one)
    for name, view in one.items():
        for a, b in zip(view.pieces(), other[name].pieces(), strict=True):
            if not np.array_equal(a.view(np.uint16), b.view(np.uint16)):
                raise SystemExit(f"{name} differs")
    return len(one)


if __name__ == "__main__":
    main()
