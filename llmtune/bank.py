"""Many adapters over one base, each row of a batch through its own.

bank = llmtune.load_bank("path/to/hf_dir", {"french": "adapters/fr", "german": "adapters/de"})
bank.rows(["french", "german", None]).generate(["cheese", "cheese", "cheese"], max_new_tokens=8)

`rows` gives a model like any other: nothing is copied but one number for each row, and the same compiled program serves
every choice. None is the base as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from llmtune import pretrained
from llmtune.errors import LlmtuneConfigError
from llmtune.model import Model, read
from llmtune.models.decoder import declare
from llmtune.origin import adapter_of, base_of
from llmtune.sharding import axis_size, put
from llmtune.transforms import bank_of, choose_rows
from llmtune.transforms import quantize as quantized
from llmtune.weights import materialize


@dataclass(frozen=True)
class AdapterBank:
    """`model`: with all adapters in place and none chosen; `names`: of the adapters, in their order."""

    model: Model
    names: tuple[str, ...]

    def rows(self, chosen: Sequence[str | None]) -> Model:
        """A model for batches of len(chosen) rows, or prompts, of which row i goes through the adapter chosen[i]."""
        numbers = {name: number for number, name in enumerate(self.names)} | {None: len(self.names)}
        for name in chosen:
            if name not in numbers:
                raise LlmtuneConfigError(f"bank: no adapter {name!r}; there are {', '.join(self.names[:20])}")
        mesh, strategy = self.model.mesh, self.model.strategy
        extra = -len(chosen) % axis_size(mesh, strategy.spec("batch")[0])  # rows that fill up a batch are the base's
        index = np.array([numbers[name] for name in [*chosen, *[None] * extra]], np.int32)
        with jax.set_mesh(mesh), strategy.active():
            params = choose_rows(self.model.params, put(index, NamedSharding(mesh, strategy.spec("batch"))))
        return replace(self.model, params=params)


def load_bank(
    path: str | Path,
    adapters: Mapping[str, str | Path] | Sequence[str | Path],
    *,
    dtype: str | None = "float32",
    strategy: str | None = None,
    quantize: str | None = None,
) -> AdapterBank:
    """A model as `llmtune.load` reads it, and LoRA adapters over it, by name (of a list: their paths).

    An adapter is a PEFT directory or a run of llmtune, that of a run over a quantised base too: `quantize` keeps this base in
    few bits (nf4, int4, int8, fp8), as `quantize.base` of a run does. Ranks, alphas and places may differ. Weights trained in
    whole (modules_to_save) cannot be chosen by row and are refused.
    """
    named = adapters if isinstance(adapters, Mapping) else {str(directory): directory for directory in adapters}
    base = base_of(path) if quantize is None else base_of(path, quantized(quantize))
    model = read(base, adapters=(), dtype=dtype, strategy=strategy)
    directories = [adapter_of(Path(directory)) for directory in named.values()]
    transform = bank_of([pretrained.read_factors(directory, model.config) for directory in directories])
    _, declared = declare(model.config)
    with jax.set_mesh(model.mesh), model.strategy.active():
        placed = materialize(transform.init(declared), jax.random.key(0), model.mesh, model.strategy)
        params = transform.apply(model.params, placed)
    return AdapterBank(replace(model, params=params), tuple(named))
