"""A process that compiles one step and is ended from outside: `python -m llmtune.planning.child RUN.yaml TOPOLOGY DUMP`."""

import os
import sys
from pathlib import Path


def main() -> None:
    """Compile the run's step for the topology, with the compiler's reports into the directory DUMP."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from llmtune import pretrained
    from llmtune.config.file import load_run
    from llmtune.planning.abstract import abstract_program
    from llmtune.planning.ahead import dumping
    from llmtune.planning.topology import devices, parse_topology
    from llmtune.training.vocabulary import settle_vocabulary
    from llmtune.training.weights import choose_layout, declare_base

    config, topology, directory = sys.argv[1:]
    run = load_run(config)
    source, _ = settle_vocabulary(run, pretrained.open_source(run.model))
    placed = devices(parse_topology(topology))
    mesh, strategy = choose_layout(run.sharding, declare_base(run, source.config)[1], placed)
    with jax.set_mesh(mesh):
        program, inputs = abstract_program(run, source, mesh, strategy)
        program.lower(inputs.state, inputs.batch).compile(compiler_options=dumping(Path(directory), mesh))


if __name__ == "__main__":
    main()
