"""`make reliability`: every row at its full size, and the table of docs/reliability.md.

python -m tests.reliability [--share S] [--rows A1,D2]

`--share 0.1` runs a tenth of the kills, mutations and steps: the table says how many were run.
"""

import argparse
import os
import platform
import signal
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
from jax.sharding import AxisType

from tests.conftest import ROOT
from tests.reliability import configurations, corruption, disk, hangs, kills, order, several, soak
from tests.reliability.forge import Forge
from tests.reliability.tiny import Ground, Row

PAGE, BEGIN, END = ROOT / "docs/reliability.md", "<!-- figures: make reliability -->", "<!-- end of figures -->"
LOST = [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)]


def mesh(fsdp, tensor):
    devices = jax.devices()[: fsdp * tensor]
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), (AxisType.Explicit,) * 2, devices=devices)


def measures(forge, share):
    """By the id of a row: what measures it, on a ground of its own."""

    def some(count):
        return max(2, round(count * share))

    one, meshes = (
        mesh(1, 1),
        [mesh(*shape) for shape in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (8, 1), (1, 8), (4, 2), (2, 4))],
    )
    return [
        ("A1", lambda ground: kills.kill_at_random(forge, ground, some(200), some(400))),
        ("A2", lambda ground: kills.kill_at_each_stroke(forge, ground)),
        ("A3", lambda ground: kills.ask_to_stop(forge, ground, some(20))),
        ("A3", lambda ground: several.ask_one(forge, ground)),
        ("A4", lambda ground: kills.storm(ground, 3)),
        ("B1", lambda ground: under(one, corruption.corrupt, ground.path, some(500), one)),
        ("B2", lambda ground: under(one, corruption.all_bad, ground.path, one)),
        ("B2", lambda ground: corruption.no_permission(forge, ground)),
        ("C1", lambda ground: disk.full_while_saving(forge, ground, [1, 2, 3, 4, 5])),
        ("C2", lambda ground: disk.full_while_exporting(forge, ground)),
        ("C1", lambda ground: several.fail_in_one(forge, ground)),
        ("D1", lambda ground: corruption.across_meshes(ground.path, meshes)),
        ("D2", lambda ground: several.lose_one(forge, ground, 2 * LOST, steps=24)),
        ("D2", lambda ground: several.elastic(forge, ground, steps=51)),
        ("D2", lambda ground: several.supervised(ground)),
        ("D3", lambda ground: hangs.hang(forge, ground)),
        ("E1", lambda ground: order.same_rows(50)),
        ("E2", lambda ground: order.same_curve(forge, ground, 100)),
        ("K1", lambda ground: configurations.read_all(ground.path / "k1", some(2000))),
        ("L1", lambda ground: soak.soak(forge, ground, some(5000))),
    ]  # fmt: skip


def under(own, measure, *arguments):
    with jax.set_mesh(own):
        return measure(*arguments)


def measure_all(share, wanted):
    rows = []
    with Forge() as forge, tempfile.TemporaryDirectory(prefix="llmtune-reliability-") as folder:
        for number, (name, measure) in enumerate(measures(forge, share)):
            if wanted and name not in wanted:
                continue
            begun = time.monotonic()
            try:
                row = measure(Ground(Path(folder) / str(number)))
            except Exception as error:
                row = Row(name, "not measured", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", False)
            seconds = time.monotonic() - begun
            rows.append((row, seconds))
            print(f"{row.id} {'ok  ' if row.ok else 'FAIL'} {seconds:5.0f} s  {row.what}: {row.figure}", flush=True)
    return rows


def lines_of(rows):
    """A line of the table for each row, by its id and what happens."""
    today, cores = f"{datetime.now(UTC):%Y-%m-%d}", os.cpu_count()
    return {
        (
            row.id,
            row.what,
        ): f"| {row.id} | {row.what} | {row.figure.replace('|', '/')} | {'yes' if row.ok else '**no**'} | "
        f"{seconds:.0f} s of {cores} cores, {today} |"
        for row, seconds in rows
    }


def with_figures(page, rows):
    """The page with these rows put into its table, in the place of what was measured before."""
    before, rest = page.split(BEGIN)
    body, after = rest.split(END)
    found = {
        tuple(part.strip() for part in line.split("|")[1:3]): line
        for line in body.splitlines()
        if line.startswith("| ")
    }
    found = {key: line for key, line in found.items() if key[0]} | lines_of(rows)
    head = [
        f"Python {platform.python_version()}, jax {jax.__version__}.",
        "",
        "| | what happens | figure | reached | took |",
    ]
    table = [*head, "|---|---|---|---|---|", *(found[key] for key in sorted(found))]
    return "\n".join([before + BEGIN, *table, END + after])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument(
        "--rows", default="", help="ids, with commas; default all. Other rows of the page stay as they are"
    )
    options = parser.parse_args()
    rows = measure_all(options.share, {name for name in options.rows.split(",") if name})
    PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return 0 if all(row.ok for row, _ in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
