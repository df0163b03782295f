"""What a row becomes: token ids with labels, aligned (the shift to next-token targets happens in the loss)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmtune.data.spans import Where

IGNORED = -100
Cut = Literal["end", "pieces", "turn"]


@dataclass(frozen=True, slots=True)
class Example:
    """int32 `input_ids` and `labels` of equal length.

    `cut`: where one that is too long may be cut: at the end of the row, into several pieces, or after a turn.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    where: Where
    cut: Cut = "end"

    @property
    def has_targets(self) -> bool:
        """Whether anything is to be learned; the first token is never a target."""
        return bool(np.any(self.labels[1:] != IGNORED))
