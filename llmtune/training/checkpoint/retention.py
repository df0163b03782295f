"""Which steps stay: the newest, and those with the best figures."""

from dataclasses import dataclass

from llmtune.config.checkpoint import Best


@dataclass(frozen=True)
class Retention:
    """`keep` newest steps, and the `best.n` with the lowest (or highest) figure of that name."""

    keep: int
    best: Best | None = None

    def removable(self, figures: dict[int, dict[str, float]]) -> list[int]:
        """Of steps and their figures, those that may go. A step without the figure is never among the best."""
        stay = set(sorted(figures)[-self.keep :])
        return sorted(figures.keys() - stay - set(self.best_of(figures)))

    def best_of(self, figures: dict[int, dict[str, float]]) -> list[int]:
        """The best steps, the best one first; of equals the earlier."""
        if self.best is None:
            return []
        name, sign = self.best.metric, 1 if self.best.mode == "min" else -1
        known = {step: sign * own[name] for step, own in figures.items() if name in own and own[name] == own[name]}
        return sorted(known, key=lambda step: (known[step], step))[: self.best.n]
