"""llmtune: fine-tuning of LLaMA 3 and Mistral in JAX and Flax, on TPU pods and GPUs with the same code.

The public surface, resolved when first used, so that `import llmtune` costs nothing:

    llmtune.load(path, adapters=(), dtype="float32", strategy=None)   a model, ready for logits and generation
    llmtune.load_bank(path, adapters)                                 many adapters, one for each row of a batch
    llmtune.train(run)                                                a run, from its configuration
    llmtune.load_run(path, overrides=())                              the configuration of a run, checked
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtune.bank import AdapterBank, load_bank
    from llmtune.config import Run
    from llmtune.config.file import load_run
    from llmtune.errors import LlmtuneError
    from llmtune.model import Model, load
    from llmtune.training.loop import train

__version__ = "0.1.0"
__all__ = ["AdapterBank", "LlmtuneError", "Model", "Run", "__version__", "load", "load_bank", "load_run", "train"]

_HOMES = {
    "AdapterBank": "llmtune.bank",
    "LlmtuneError": "llmtune.errors",
    "Model": "llmtune.model",
    "Run": "llmtune.config",
    "load": "llmtune.model",
    "load_bank": "llmtune.bank",
    "load_run": "llmtune.config.file",
    "train": "llmtune.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmtune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
