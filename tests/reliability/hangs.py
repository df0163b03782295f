"""D3: the loader, or the step, never returns."""

import re
import time

from llmtune import exit_codes
from tests.reliability.tiny import Row

PLACES = {
    "read": {"at": "llmtune.data.batches:assemble", "nth": 24},
    "row": {"at": "llmtune.training.meter:Meter.row", "nth": 4},
    "place": {"at": "llmtune.training.program:Program.place", "nth": 6},
}


def hang(forge, ground, seconds=3.0, places=PLACES, patience=5):
    ended, late = 0, -float("inf")
    for name, place in places.items():
        directory = ground.path / f"d3-{name}"
        config = ground.config(f"d3-{name}", steps=40, safeguards={"hang_seconds": seconds})
        trainer = forge.train(config, fault={"do": "block", **place})
        while trainer.poll() is None and "compiled the train step" not in trainer.said:
            time.sleep(0.05)
        code, ended_at = trainer.wait(120), time.monotonic()
        since = re.search(r"blocked at ([0-9.]+)", trainer.said)
        limit = re.search(r"no step was finished for (\d+) s", trainer.said)  # more than asked where steps are slow
        took = ended_at - float(since.group(1)) if since else float("inf")
        late = max(late, took - (float(limit.group(1)) if limit else seconds))
        stacks = directory / "hang.txt"
        ended += code == exit_codes.HUNG and stacks.exists() and "block_for_ever" in stacks.read_text()
    figure = (
        f"{ended} of {len(places)} ended with code 70 and stacks that show where, "
        f"the slowest {late:+.1f} s after its limit of {seconds:g} s"
    )
    return Row(
        "D3", "a loader, a placement, a step that never return", figure, ended == len(places) and late <= patience
    )
