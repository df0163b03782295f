"""The plans of epochs that follow each other without a gap: which epoch a row of the whole run is of, and where in it.

What stays of an epoch once later ones are read is its number of rows: a run of many epochs holds no more than a run of two.
"""

import bisect
import threading
from collections import OrderedDict
from collections.abc import Callable

from llmtune.data.packing import Plan

HELD = 2  # an epoch and the next one, which is read ahead


class Epochs:
    """Plans by epoch, made by `make(epoch)` as they are needed; may be asked by several threads at a time."""

    def __init__(self, make: Callable[[int], Plan]):
        self._make = make
        self._firsts = [0]  # of each epoch that was planned, and of the one after them: the rows before it
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._lock = threading.Lock()

    def row(self, index: int) -> tuple[Plan, int]:
        """(the plan that has it, the row in that plan) of row `index` of the run."""
        with self._lock:
            epoch, row = self._place(index)
            return self._plan(epoch), row

    def passed(self, index: int) -> float:
        """Epochs in the first `index` rows."""
        with self._lock:
            epoch, row = self._place(index)
            return epoch + row / (self._firsts[epoch + 1] - self._firsts[epoch])

    def rows_before(self, epoch: int) -> int:
        """Rows of the first `epoch` epochs."""
        with self._lock:
            while len(self._firsts) <= epoch:
                self._plan(len(self._firsts) - 1)
            return self._firsts[epoch]

    def _place(self, index: int) -> tuple[int, int]:
        while index >= self._firsts[-1]:
            self._plan(len(self._firsts) - 1)
        epoch = bisect.bisect_right(self._firsts, index) - 1
        return epoch, index - self._firsts[epoch]

    def _plan(self, epoch: int) -> Plan:
        if epoch not in self._plans:
            self._plans[epoch] = self._make(epoch)
            if epoch + 1 == len(self._firsts):
                self._firsts.append(self._firsts[-1] + len(self._plans[epoch]))
        self._plans.move_to_end(epoch)
        while len(self._plans) > HELD:
            self._plans.popitem(last=False)
        return self._plans[epoch]
