"""Make `llmtune/starter` again: `make starter`.

    grammar --seed--> stories, instructions --> tokenizer --> llmtune train (starter_pretrain.yaml) --> llmtune/starter

The same machine and versions give the same bytes; others the same loss to 1 %.
"""

import json
import os
import random
import shutil
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmtune.config.file import load_run
from llmtune.training.loop import train
from starter.grammar import instruction, story

ROOT = Path(__file__).parent.parent
WORK = ROOT / "runs" / "starter"
TARGET = ROOT / "llmtune" / "starter"
RECIPE = ROOT / "configs" / "recipes" / "starter_pretrain.yaml"
STORIES, HELD_OUT_STORIES = 40_000, 200
INSTRUCTIONS, HELD_OUT_INSTRUCTIONS = 1500, 100
VOCABULARY = 1024
BOS, EOS = "<s>", "</s>"


def main() -> None:
    """All steps, from nothing."""
    os.chdir(ROOT)
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    stories = distinct(lambda rng: story(rng), STORIES + HELD_OUT_STORIES, seed=1)
    instructions = distinct(instruction, INSTRUCTIONS + HELD_OUT_INSTRUCTIONS, seed=2)
    write_jsonl(WORK / "stories_train.jsonl", [{"text": text} for text in stories[HELD_OUT_STORIES:]])
    write_jsonl(WORK / "stories_validation.jsonl", [{"text": text} for text in stories[:HELD_OUT_STORIES]])

    tokenizer = train_tokenizer(stories[:5000], [row["prompt"] + row["completion"] for row in instructions])
    write_tokenizer(tokenizer, WORK / "tokenizer")
    summary = train(load_run(RECIPE))

    TARGET.mkdir(exist_ok=True)
    for file in summary.exports["model"].iterdir():
        shutil.copyfile(file, TARGET / file.name)
    write_jsonl(TARGET / "instructions_train.jsonl", instructions[HELD_OUT_INSTRUCTIONS:])
    write_jsonl(TARGET / "instructions_validation.jsonl", instructions[:HELD_OUT_INSTRUCTIONS])


def distinct(draw, count: int, seed: int) -> list:
    """`count` different draws, in the order in which they came."""
    rng, seen = random.Random(seed), {}
    while len(seen) < count:
        value = draw(rng)
        seen.setdefault(json.dumps(value), value)
    return list(seen.values())


def train_tokenizer(*texts: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE: every text has ids, and every id sequence a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for part in texts for text in part], trainer)
    return tokenizer


def write_tokenizer(tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
    """tokenizer.json and the settings beside it."""
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    ids = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS), "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
