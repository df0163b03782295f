"""Tokenise and pack, llmtune beside datasets + tokenizers, in turn, on the same rows with the same tokenizer.

    python -m benchmarks.input_pipeline --rows gsm8k_train.jsonl --tokenizer path/to/llama3

A measurement begins with a tokenizer.json and a jsonl file of {"question", "answer"} rows and ends with packed rows of `length`
tokens in memory: ids, labels (completion only), segment ids and positions. The peer is what TRL does for the same:
`datasets.map(batched=True)` over a tokenizers tokenizer, best-fit-decreasing packing, and the same four columns. Both sides
read each row once; caches are off.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import side_by_side

COLUMNS = {"prompt": "question", "completion": "answer"}


def prepare_llmtune(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    from llmtune import pretrained
    from llmtune.config.file import build_run
    from llmtune.data import load_data, read_batches

    tree = {
        "model": settings["shape"], "output": "unused",
        "data": {"train": settings["rows"], "format": "prompt_completion", "columns": COLUMNS,
                 "tokenizer": settings["tokenizer"], "sequence_length": settings["length"], "packing": True},
        "train": {"epochs": 1, "batch_size": 8},
    }  # fmt: skip
    run = build_run(tree, "benchmark")
    source = pretrained.open_source(run.model)  # a configuration alone: nothing here needs weights
    facts: dict[str, Any] = {}

    def work() -> float:
        start = time.perf_counter()
        data = load_data(run, source.config, source.directory)
        steps = data.steps(run)
        rows = sum(len(batch["tokens"]) for batch in read_batches(data.source(run, steps), 0))
        seconds = time.perf_counter() - start
        facts.update(tokens=data.train.counts.tokens, packed_rows=rows)
        return seconds

    work()
    return facts, work


def prepare_peer(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    import datasets
    import numpy as np
    from tokenizers import Tokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    bos, eos, length = settings["bos"], settings["eos"], settings["length"]
    facts: dict[str, Any] = {}

    def tokenise(batch: dict[str, list], tokenizer: Tokenizer) -> dict[str, list]:
        prompts = tokenizer.encode_batch_fast(batch[COLUMNS["prompt"]], add_special_tokens=False)
        completions = tokenizer.encode_batch_fast(batch[COLUMNS["completion"]], add_special_tokens=False)
        ids, labels = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            row = [bos, *prompt.ids, *completion.ids, eos][:length]
            ids.append(row)
            labels.append(([-100] * (1 + len(prompt.ids)) + [*completion.ids, eos])[:length])
        return {"input_ids": ids, "labels": labels}

    def pack(batch: dict[str, list]) -> dict[str, list]:
        """Best-fit-decreasing by exact remaining room, as TRL's `bfd` strategy."""
        order = sorted(range(len(batch["input_ids"])), key=lambda i: -len(batch["input_ids"][i]))
        by_room: dict[int, list[list[int]]] = {}
        rows: list[list[int]] = []
        for i in order:
            size = len(batch["input_ids"][i])
            room = next((r for r in range(size, length + 1) if by_room.get(r)), None)
            row = by_room[room].pop() if room is not None else []
            if room is None:
                rows.append(row)
                room = length
            row.append(i)
            by_room.setdefault(room - size, []).append(row)
        out: dict[str, list] = {"input_ids": [], "labels": [], "segment_ids": [], "positions": []}
        for row in rows:
            sizes = [len(batch["input_ids"][i]) for i in row]
            padding = length - sum(sizes)
            flat = {name: [t for i in row for t in batch[name][i]] for name in ("input_ids", "labels")}
            out["input_ids"].append(flat["input_ids"] + [0] * padding)
            out["labels"].append(flat["labels"] + [-100] * padding)
            out["segment_ids"].append([n for n, size in enumerate(sizes, 1) for _ in range(size)] + [0] * padding)
            out["positions"].append([p for size in sizes for p in range(size)] + [0] * padding)
        return out

    def work() -> float:
        start = time.perf_counter()
        tokenizer = Tokenizer.from_file(str(Path(settings["tokenizer"]) / "tokenizer.json"))
        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.load_dataset("json", data_files=settings["rows"], split="train", cache_dir=cache)
            assert isinstance(rows, datasets.Dataset)
            columns = rows.column_names
            tokens = rows.map(tokenise, batched=True, remove_columns=columns, fn_kwargs={"tokenizer": tokenizer})
            packed = tokens.map(pack, batched=True, batch_size=None).with_format("numpy")
            count = 0
            for batch in packed.iter(batch_size=8):
                assert isinstance(batch, dict) and all(isinstance(column, np.ndarray) for column in batch.values())
                count += len(batch["input_ids"])
        seconds = time.perf_counter() - start
        facts.update(tokens=sum(map(len, tokens["input_ids"])), packed_rows=count)
        return seconds

    work()
    return facts, work


def arguments() -> argparse.ArgumentParser:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--rows", help="a jsonl file of question/answer rows, such as GSM8K's")
    parser.add_argument("--tokenizer", help="a directory with a tokenizer.json")
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row")
    return parser


def measure(own: argparse.Namespace) -> dict[str, Any]:
    if not own.rows or not own.tokenizer:
        raise SystemExit("--rows and --tokenizer are needed; see --help")
    from llmtune.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(Path(own.tokenizer))
    assert tokenizer is not None
    count = sum(1 for line in Path(own.rows).read_bytes().splitlines() if line.strip())
    shape = "llama3.1-8b" if tokenizer.vocab_size > 32768 else "mistral-7b-v0.3"
    settings = {"rows": own.rows, "tokenizer": own.tokenizer, "length": own.length, "shape": shape,
                "bos": tokenizer.bos_id, "eos": tokenizer.eos_ids[0]}  # fmt: skip
    print(f"tokenise and pack {count:,} rows of {own.rows} into rows of {own.length}", flush=True)
    found = side_by_side.compare("benchmarks.input_pipeline", settings, pairs=own.pairs, units=count, unit="rows/s")
    if found["llmtune"]["tokens"] != found["peer"]["tokens"]:
        raise SystemExit("the two sides disagree on the number of tokens: the comparison is void")
    return found


if __name__ == "__main__":
    side_by_side.run(arguments(), prepare_llmtune, prepare_peer, measure)
