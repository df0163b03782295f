"""Two adapters on two data sets, and their fusion on both: held-out loss of each on the mixture.

    python -m benchmarks.fusion --assets ../shared/assets

Base: stories260K. The data sets: word problems of GSM8K, and Shakespeare's plays. Three runs of `llmtune train`, each measured
on the same mixture: a tenth of the plays, and as many characters of GSM8K's test set. In the third run the two adapters stay
as they are, and only the attention over them trains. For comparison a fourth: one adapter trained on the mixture.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import llmtune
from llmtune.training.display import Display

PASSAGE = 600  # characters of a document of the plays


def write_texts(assets: Path, directory: Path) -> dict[str, Path]:
    """Rows of text: `{"math": ..., "plays": ..., "math_held_out": ..., "plays_held_out": ...}`."""
    play = (assets / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    passages = [play[at : at + PASSAGE] for at in range(0, len(play), PASSAGE)]
    split = len(passages) * 9 // 10
    size = sum(map(len, passages[split:]))
    texts = {
        "math": problems(assets / "data" / "gsm8k_train.jsonl", None),
        "plays": passages[:split],
        "math_held_out": problems(assets / "data" / "gsm8k_test.jsonl", size),
        "plays_held_out": passages[split:],
    }
    for name, rows in texts.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return {name: directory / f"{name}.jsonl" for name in texts}


def problems(path: Path, characters: int | None) -> list[str]:
    """Questions with their answers, up to so many characters in all."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    ends = np.cumsum([len(text) for text in texts])
    return texts if characters is None else texts[: int(np.searchsorted(ends, characters))]


def train(directory: Path, name: str, base: Path, data: dict[str, Path], train_on: list[str], **sections: Any) -> Path:
    """One run; its directory."""
    tree = {
        "model": str(base),
        "output": str(directory / name),
        "objective": "pretrain",
        "data": {
            "train": [str(data[part]) for part in train_on],
            "validation": [str(data["math_held_out"]), str(data["plays_held_out"])],
            "format": "text",
            "sequence_length": 256,
        },
        "evaluate": {"every": None},
        **sections,
    }
    (directory / f"{name}.yaml").write_text(json.dumps(tree))
    llmtune.train(llmtune.load_run(directory / f"{name}.yaml"), Display(Console(quiet=True)))
    return directory / name


def held_out(run: Path) -> dict[str, float]:
    """Loss in nats per token on the mixture, before and after training."""
    figures = json.loads((run / "evaluation.json").read_text())
    return {moment: figures[moment]["loss"] for moment in ("before", "after")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--size", type=int, default=16, help="width of the bottlenecks")
    own = parser.parse_args()
    base = own.assets / "models" / "stories260K"
    pfeiffer = {"method": "pfeiffer", "size": own.size}
    common = {
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 20},
        "train": {"steps": own.steps, "batch_size": 8, "dtype": "float32", "remat": "none"},
    }
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        data = write_texts(own.assets, directory)
        singles = [train(directory, n, base, data, [n], adapt=pfeiffer, **common) for n in ("math", "plays")]
        print(f"base: {held_out(singles[0])['before']:.4f}", flush=True)
        for run in singles:
            print(f"adapter of {run.name}: {held_out(run)['after']:.4f}", flush=True)
        fusion = {"method": "fusion", "adapters": [str(run / "export" / "adapter") for run in singles]}
        fused = held_out(train(directory, "fusion", base, data, ["math", "plays"], adapt=fusion, **common))
        print(f"fusion: {fused['before']:.4f} before it trains, {fused['after']:.4f} after", flush=True)
        both = held_out(train(directory, "both", base, data, ["math", "plays"], adapt=pfeiffer, **common))
        print(f"one adapter trained on both: {both['after']:.4f}", flush=True)


if __name__ == "__main__":
    main()
