"""Services by the names of `tracking.to`; their packages (extras `track`, `trackio`) are imported only when asked for."""

import importlib.util
from collections.abc import Callable, Sequence

from llmtune.errors import LlmtuneConfigError
from llmtune.tracking.mlflow import Mlflow
from llmtune.tracking.tracker import Guarded, Place, Tracker
from llmtune.tracking.trackio import Trackio
from llmtune.tracking.wandb import Wandb

SERVICES: dict[str, Callable[[Place], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def require_installed(names: Sequence[str]) -> None:
    """Raises LlmtuneConfigError for a service whose package is absent; imports none."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            extra = "trackio" if name == "trackio" else "track"
            raise LlmtuneConfigError(
                f"tracking.to: {name} is not installed; pip install 'llmtune[{extra}]', or leave it out"
            )


def open_services(names: Sequence[str], place: Place, say: Callable[[str], None]) -> list[Tracker]:
    """One guarded tracker for each name."""
    return [Guarded(name, lambda open=SERVICES[name]: open(place), say) for name in names]
