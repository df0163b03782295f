"""C: the disk takes no more, for a while: RLIMIT_FSIZE stands for it, in the very process that trains."""

from llmtune import exit_codes
from tests.reliability.faults import CHECKPOINTS, COMMIT
from tests.reliability.kills import LEAVE
from tests.reliability.tiny import FULL, Row, curve, state_hash


def full_while_saving(forge, ground, saves):
    """C1: at one of five saves. The save before stays, the run goes on, a step later the state is saved."""
    whole = ground.path / "c1"
    assert forge.train(ground.config("c1", steps=10, adapt=FULL), fault=LEAVE).wait() == 0
    good, told = 0, 0
    for number in saves:
        config, directory = ground.config(f"c1-{number}", steps=10, keep=9, adapt=FULL), ground.path / f"c1-{number}"
        fault = {
            "do": "full",
            "at": f"{COMMIT}:start_writing",
            "nth": number,
            "until": f"{CHECKPOINTS}:steps.remove_halves",
        }
        trainer = forge.train(config, fault=fault)
        code = trainer.wait()
        told += trainer.said.count("it is tried again")
        kept = {path.name for path in directory.glob("checkpoints/*")}
        due = {2, 4, 6, 8, 10} - ({2 * number} if number < 5 else set())  # the last is saved again itself
        there = set(map(str, due)) <= kept and all(name.isdecimal() for name in kept)
        same = (curve(directory), state_hash(directory)) == (curve(whole), state_hash(whole))
        good += code == 0 and there and same
    figure = f"{good} of {len(saves)} runs went on and saved again, {told} told in one line, no half step left"
    return Row("C1", "disk full while saving", figure, good == told == len(saves))


def full_while_exporting(forge, ground):
    """C2: no half export; the same command makes it when there is room."""
    config, directory = ground.config("c2", steps=4, adapt=FULL), ground.path / "c2"
    trainer = forge.train(config, fault={"do": "full", "at": "llmtune.training.loop:export_run"})
    code, left = trainer.wait(), list(directory.glob("export/*"))
    errors = [line for line in trainer.said.splitlines() if line.startswith("llmtune: error:")]
    again = forge.train(config).wait()
    made = (directory / "export/model/model.safetensors").is_file()
    ok = code == exit_codes.USAGE and not left and len(errors) == 1 and again == 0 and made
    return Row(
        "C2",
        "disk full while exporting",
        f"code {code}, {'a half' if left else 'no half'} export, made by the next call",
        ok,
    )
