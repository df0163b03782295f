"""What ships with llmtune: recipes, presets and strategies, and the embedded starter model.

In a checkout `configs/` stands at the repository's root; in an installed wheel it lies inside the package. A path that begins
with `llmtune:` names something inside the package, e.g. `llmtune:starter`.
"""

from pathlib import Path

PACKAGE = Path(__file__).parent
PREFIX = "llmtune:"


def configs_directory() -> Path:
    """The directory that holds recipes/, models/ and strategies/."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def resolve(path: str) -> Path:
    """The file or directory that a path in a configuration means."""
    if path.startswith(PREFIX):
        return PACKAGE / path.removeprefix(PREFIX)
    try:
        return Path(path).expanduser()
    except RuntimeError:  # "~somebody" who has no home here: a name like any other
        return Path(path)
