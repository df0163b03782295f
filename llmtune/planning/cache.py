"""What compilers said, kept: a layout that was compiled before is read in no time.

    digest of run, model, topology, strategy table, versions, llmtune's sources  -->  <cache>/llmtune/plans/DIGEST.json

Whatever a program depends on is in the digest, so that nothing in the cache is ever out of date; old files are only unused.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from llmtune.config.file import dump_run
from llmtune.planning.ahead import Compiled
from llmtune.planning.collectives import Collective
from llmtune.planning.layout import Layout
from llmtune.shipped import PACKAGE

DISTRIBUTIONS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax")


def cached(compile_layout: Callable[[Layout], Compiled], directory: Path | None = None) -> Callable[[Layout], Compiled]:
    """The same function, asked once for each layout; `seconds` stay those of the time when it was asked."""
    home = directory or default_directory()

    def read_or_compile(layout: Layout) -> Compiled:
        path = home / f"{digest(layout, compile_layout.__name__)}.json"
        try:
            return _from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):  # not there, or cut off by a full disk
            compiled = compile_layout(layout)
        home.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(dataclasses.asdict(compiled)), encoding="utf-8")
        beside.replace(path)
        return compiled

    return read_or_compile


def default_directory() -> Path:
    """`$XDG_CACHE_HOME/llmtune/plans`, or that of ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "llmtune" / "plans"


def digest(layout: Layout, how: str) -> str:
    """sha256 of all that the compiled program depends on, and of how it was compiled."""
    run = dataclasses.replace(layout.run, output="")
    strategy = dataclasses.asdict(layout.strategy)
    model = json.dumps(layout.source.hf_config, sort_keys=True, default=str)
    parts = [how, dump_run(run), model, layout.topology.name, repr(layout.sizes), repr(strategy), versions(), sources()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@functools.cache
def versions() -> str:
    """Of the libraries that make the program; of those that are installed."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "none"

    return " ".join(f"{name} {version(name)}" for name in DISTRIBUTIONS)


@functools.cache
def sources() -> str:
    """sha256 of llmtune's own code."""
    own = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        own.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return own.hexdigest()


def _from_json(text: str) -> Compiled:
    tree = json.loads(text)
    exchanged = tuple(Collective(**own) for own in tree.pop("collectives"))
    return Compiled(collectives=exchanged, kernels=tuple(tree.pop("kernels")), **tree)
