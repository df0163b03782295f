"""K1: configurations that nobody would write. Each gives a run that reads back equal, or one line that says where."""

import collections
import json
import time

import numpy as np

from llmtune.config import Run, key_reference
from llmtune.config.file import build_run, dump_run, load_run, parse_yaml
from llmtune.errors import LlmtuneConfigError
from tests.reliability.tiny import Row

BASE = {"model": "hf", "output": "runs/example", "data": {"train": "train.jsonl"}}
VALUES = (
    *(
        "1e-5",
        "1e400",
        "-0.0",
        ".nan",
        ".inf",
        "no",
        "on",
        "~",
        "''",
        "0x1F",
        "0o17",
        "1_000",
        "-1",
        "0",
        "64",
        "true",
        "2147483648",
    ),
    *(
        "99999999999999999999",
        "0.3333333333333333",
        "2026-11-28",
        "[1, [2, {a: b}]]",
        "{}",
        "[]",
        "{a: 1}",
        "'\\u2028'",
        '"\\ud800"',
    ),
    *(
        "!!python/object/apply:os.system [ls]",
        "!!binary aGk=",
        "!own x",
        "&a [*a]",
        "*nobody",
        "<<: {a: 1}",
        "? [a]\n  : b",
    ),
    *("|\n  two\n  lines", "\t", "\ufb01", "../x", "adamw", "lora", "bfloat16"),
)
MARKS = (*"{}[]:,-&*!|>'\"%@`#? \n\t~.01ae", "\x00", "\ufeff", "\u2028", "\u00e9", "\r\n", "<<", "---", "!!", "...")


def damaged(random, text):
    """A part of the text cut out, and marks of YAML put in its place."""
    first, last = sorted(random.integers(0, len(text) + 1, 2).tolist())
    last = (first, min(first + 1, len(text)), last)[random.integers(3)]
    return text[:first] + "".join(random.choice(MARKS, random.integers(0, 5))) + text[last:]


def keyed(random, text):
    """A key that exists, or nearly, with a value of another kind: as a line, over a whole section, or twice."""
    name = random.choice([row[0] for row in key_reference(Run)])
    if random.random() < 0.3:
        at = random.integers(len(name))
        name = name[:at] + random.choice(["x", "", ".", "_", "-"]) + name[at + 1 :]
    *sections, last = name.split(".")
    value = random.choice(VALUES)
    for section in reversed(sections):
        last, value = section, f"{{{last}: {value}}}"
    return f"{text}{last}: {value}\n"


def crossed(random, text):
    """Two of these."""
    return keyed(random, keyed(random, text))


def deep(random, text):
    """Thousands of levels, aliases that grow without bound, much of anything."""
    number = int(random.integers(50, 20_000))
    return (
        text
        + (
            "a: " + "[" * number + "]" * number,
            "a: " + "{b: " * number + "1" + "}" * number,
            "a0: &a0 [x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, number % 40)),
            "evaluate: {prompts: [" + "x, " * number + "x]}",
            "".join(f"k{n}: {n}\n" for n in range(number)),
            f"output: {'y' * number * 50}\n",
            "- " * number,
        )[random.integers(7)]
    )


KINDS = (damaged, keyed, crossed, deep)


def read_all(folder, count, patience=1):
    """K1. Of every tenth, the last line comes from the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    random, found, wrong, slowest = np.random.default_rng(count), collections.Counter(), [], 0.0
    base = "".join(f"{name}: {json.dumps(value)}\n" for name, value in BASE.items())
    for number in range(count):
        text, overrides = KINDS[number % len(KINDS)](random, base), []
        if number % 10 == 9:
            overrides = [f"--{random.choice(key_reference(Run))[0]}", str(random.choice(VALUES))]
        path = folder / "run.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        begun = time.process_time()
        outcome = read(path, overrides)
        slowest = max(slowest, time.process_time() - begun)
        found[outcome] += 1
        if outcome not in ("read", "refused"):
            wrong.append((outcome, text[-200:], overrides))
    figure = f"{found['read']} read and read back equal, {found['refused']} refused in one line, {len(wrong)} else, of {count}; "
    figure += f"the slowest took {slowest:.2f} s" + (f"; {wrong[:3]}" if wrong else "")
    return Row(
        "K1",
        "configurations that nobody would write",
        figure,
        not wrong and slowest <= patience and min(found.values()) > 0,
    )


def read(path, overrides):
    try:
        run = load_run(path, overrides)
    except LlmtuneConfigError as error:
        said = str(error)
        one = len(said.splitlines()) == 1 and len(said) < 600 and said.isprintable()
        return (
            "refused" if one and ("run.yaml" in said or said.lstrip("'").startswith("--")) else f"said {said[:300]!r}"
        )
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    again = build_run(parse_yaml(dump_run(run), "config.yaml"), "config.yaml")  # as a run's own file is read
    return "read" if again == run else "read back as another"
