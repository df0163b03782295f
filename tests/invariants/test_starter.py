"""The starter model's files are those that its scripts make; `make starter` makes the weights too, in some minutes."""

from starter.grammar import instruction
from starter.make import HELD_OUT_INSTRUCTIONS, INSTRUCTIONS, distinct, write_jsonl


def test_the_instructions_are_those_of_the_grammar(starter, tmp_path):
    rows = distinct(instruction, INSTRUCTIONS + HELD_OUT_INSTRUCTIONS, seed=2)
    parts = {
        "instructions_train": rows[HELD_OUT_INSTRUCTIONS:],
        "instructions_validation": rows[:HELD_OUT_INSTRUCTIONS],
    }
    for name, part in parts.items():
        write_jsonl(tmp_path / name, part)
        assert (tmp_path / name).read_bytes() == (starter / f"{name}.jsonl").read_bytes(), name


def test_the_model_is_small_enough_to_ship(starter):
    assert 1_000_000 < (starter / "model.safetensors").stat().st_size < 3_000_000
