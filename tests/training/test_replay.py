"""The recipe against forgetting: with a little of the old data mixed in, a model that learns something new forgets less."""

import json
import random

import jax

import llmtune
from starter.grammar import story
from tests.runs import run_config


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": own}) + "\n" for own in texts))
    return path


def test_replay_forgets_less_and_learns_the_new_all_the_same(starter, assets, tmp_path):
    """The starter knows its stories; it learns Shakespeare, without and with a tenth of other stories in each epoch."""
    draw = random.Random(1)
    text = (assets / "data/tinyshakespeare.txt").read_text()
    new = write_texts(tmp_path / "new.jsonl", [text[at : at + 160] for at in range(0, 160 * 400, 160)])
    held = write_texts(tmp_path / "held.jsonl", [story(draw) for _ in range(40)])
    old = write_texts(tmp_path / "old.jsonl", [story(draw) for _ in range(400)])

    def trained(name, train):
        run = run_config(
            tmp_path, starter, new, name=name, data={"train": train, "validation": str(held), "sequence_length": 128},
            train={"steps": 40, "batch_size": 8, "dtype": "float32"}, evaluate={"every": None},
            optimizer={"learning_rate": 1e-3, "warmup_steps": 3},
        )  # fmt: skip
        summary = llmtune.train(run, devices=jax.devices()[:1])
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        learned = [row.get("loss/new", row["loss"]) for row in rows]
        return summary.before.loss, summary.after.loss, learned[0], sum(learned[-10:]) / 10

    known, alone, unread, learned = trained("alone", [str(new)])
    _, replayed, _, still = trained("replay", [{"path": str(new)}, {"path": str(old), "weight": 0.1}])
    print(known, alone, unread, learned, replayed, still)
    assert alone > known + 0.5  # there is something to forget
    assert replayed - known < 0.5 * (alone - known)
    assert still < unread - 0.5 and abs(still - learned) < 0.3
