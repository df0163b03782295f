"""D3: the loader, or the step, never returns."""

import time

from llmtune import exit_codes
from tests.reliability.tiny import Row

PLACES = {
    "read": {"at": "llmtune.data.batches:assemble", "nth": 24},
    "row": {"at": "llmtune.training.meter:Meter.row", "nth": 4},
    "place": {"at": "llmtune.training.program:Program.place", "nth": 6},
}


def hang(forge, ground, seconds=3.0, places=PLACES):
    ended, slowest = 0, 0.0
    for name, place in places.items():
        directory = ground.path / f"d3-{name}"
        config = ground.config(f"d3-{name}", steps=40, safeguards={"hang_seconds": seconds})
        trainer = forge.train(config, fault={"do": "block", **place})
        while trainer.poll() is None and "compiled the train step" not in trainer.said:
            time.sleep(0.05)
        begun = time.monotonic()
        code = trainer.wait(120)
        slowest = max(slowest, time.monotonic() - begun)
        stacks = directory / "hang.txt"
        ended += code == exit_codes.HUNG and stacks.exists() and "block_for_ever" in stacks.read_text()
    figure = (
        f"{ended} of {len(places)} ended with code 70 and stacks that show where, "
        f"slowest {slowest:.1f} s after compilation, at a limit of {seconds:g} s"
    )
    return Row("D3", "a loader, a placement, a step that never return", figure, ended == len(places))
