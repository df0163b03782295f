"""A model of 2 layers, width 64, vocabulary 512, and runs on random rows: all that a fault needs."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llmtune.training.checkpoint.steps import steps_on_disk

WIDTH, INNER, VOCABULARY, LAYERS = 64, 128, 512, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TRAIN = {"batch_size": 4, "dtype": "float32", "remat": "none", "seed": 5}
LORA, FULL = {"rank": 4, "alpha": 8}, None


@dataclass(frozen=True)
class Row:
    """A line of the table: `ok` where the figure that was asked for is reached."""

    id: str
    what: str
    figure: str
    ok: bool


def write_model(path):
    random, names = np.random.default_rng(0), {}

    def matrix(name, rows, columns):
        names[name] = (random.normal(size=(rows, columns)) * 0.05).astype(np.float32)

    matrix("model.embed_tokens.weight", VOCABULARY, WIDTH)
    matrix("lm_head.weight", VOCABULARY, WIDTH)
    names["model.norm.weight"] = np.ones(WIDTH, np.float32)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for part, rows, columns in (("self_attn.q_proj", 64, 64), ("self_attn.k_proj", 32, 64), ("self_attn.v_proj", 32, 64),
                                    ("self_attn.o_proj", 64, 64), ("mlp.gate_proj", INNER, 64), ("mlp.up_proj", INNER, 64),
                                    ("mlp.down_proj", 64, INNER)):  # fmt: skip
            matrix(f"{at}.{part}.weight", rows, columns)
        for part in ("input_layernorm", "post_attention_layernorm"):
            names[f"{at}.{part}.weight"] = np.ones(WIDTH, np.float32)
    path.mkdir(parents=True, exist_ok=True)
    save_file(names, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def write_rows(path, rows=96):
    random = np.random.default_rng(1)
    lengths = random.integers(8, 33, rows)
    lines = [random.integers(3, VOCABULARY, length).tolist() for length in lengths]
    path.write_text("".join(json.dumps({"input_ids": own, "labels": own}) + "\n" for own in lines))
    return path


@dataclass(frozen=True)
class Ground:
    """A folder with the model and the rows; `config` writes a run of them."""

    path: Path

    def __post_init__(self):
        if not (self.path / "model").exists():
            write_model(self.path / "model")
            write_rows(self.path / "rows.jsonl")

    def config(self, name, *, steps=12, every=2, keep=3, adapt=LORA, **sections):
        rows = str(self.path / "rows.jsonl")
        tree = {
            "model": str(self.path / "model"),
            "output": str(self.path / name),
            "data": {"train": rows, "format": "tokens", "sequence_length": 32, **sections.pop("data", {})},
            "train": {**TRAIN, "steps": steps, **sections.pop("train", {})},
            "checkpoint": {"every": every, "keep": keep, **sections.pop("checkpoint", {})},
            "evaluate": {"every": None},
            **({} if adapt is None else {"adapt": adapt}),
            **sections,
        }
        path = self.path / f"{name}.yaml"
        path.write_text(json.dumps(tree))
        return path


def rows_of(directory):
    """The whole lines of metrics.jsonl."""
    path = Path(directory) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def curve(directory):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows_of(directory)]


def newest(directory):
    return max(steps_on_disk(Path(directory) / "checkpoints"), default=0)


def state_hash(directory):
    """The digests of the newest step's arrays."""
    manifest = json.loads((Path(directory) / "checkpoints" / str(newest(directory)) / "MANIFEST.json").read_text())
    return manifest["step"], {name: own["digest"] for name, own in manifest["arrays"].items()}
