"""Groups of weights with a learning rate of their own, or without decay: rules of a run, as functions of a leaf's path.

optimizer: {rates: {embed_tokens: 0.1}, undecayed: [norm]}, adapt: {b_rate: 16}
  -->  rate of embed/table 0.1, of layers/0/attention/q/kernel/b 16; norm/weight and layers/0/*_norm/weight do not decay
"""

from typing import Any

from llmtune.config import Run
from llmtune.config.adapt import sections
from llmtune.optimizers import Rates, rates_by_rule
from llmtune.training.adapting import learning_rates
from llmtune.transforms import select_whole


def rates_and_undecayed(run: Run, trainable: Any) -> tuple[Rates, tuple[str, ...]]:
    """(a leaf's path -> its learning rate, in that of all; the paths of weights that do not decay).

    Raises LlmtuneConfigError naming a rule that matches no weight that trains.
    """
    named = {rule: select_whole(trainable, [rule], key="optimizer.rates") for rule in run.optimizer.rates}
    adapters, groups = learning_rates(sections(run.adapt)), rates_by_rule(run.optimizer.rates, named)
    undecayed = select_whole(trainable, run.optimizer.undecayed, key="optimizer.undecayed")
    return lambda path: adapters(path) * groups(path), undecayed
