"""A process that compiles one step and is ended from outside: `python -m llmtune.planning.child RUN.yaml TOPOLOGY DUMP`."""

import os
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    """Compile the run's step for the topology, with the compiler's reports into the directory DUMP."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from llmtune import pretrained
    from llmtune.config.file import load_run
    from llmtune.planning.ahead import dumping
    from llmtune.planning.layout import lay_out
    from llmtune.planning.topology import devices, parse_topology
    from llmtune.training.vocabulary import settle_vocabulary

    config, name, directory = sys.argv[1:]
    run, topology = load_run(config), parse_topology(name)
    source, _ = settle_vocabulary(run, pretrained.open_source(run.model))
    layout = lay_out(run, source, topology, devices(topology))
    with jax.set_mesh(layout.mesh):
        lowered = layout.program.lower(layout.inputs.state, layout.inputs.batch)
        lowered.compile(compiler_options=dumping(Path(directory), layout.mesh))


def _end_with(parent: int) -> None:
    """A compiler nobody waits for any more is of no use, however its parent ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
