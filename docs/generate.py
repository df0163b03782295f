"""Write docs/configuration.md from the dataclasses of llmtune.config: `make docs`. A test holds the page to the code."""

from pathlib import Path

from llmtune.config import key_reference
from llmtune.config.adapt import METHODS
from llmtune.config.optimizers import OPTIMIZERS

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

One YAML file describes one run; `llmtune train CONFIG.yaml` carries it out. Any key can be put over the file on the command
line: `--optimizer.learning_rate 1e-4` (values are read as YAML). This page is generated from the code by `make docs`.

- A key that does not exist, stands twice or has the wrong type is refused, with its path and, for a slip of the pen, the
  nearest key. Numbers may be written `1e-5` (plain YAML would read a text there); `yes`, `no`, `on`, `off` are texts.
- The resolved configuration, every default written out, lies in the run's directory as `config.yaml`.
- The same command on its own run directory resumes. Another configuration is refused with what differs; only
  `sharding`, `checkpoint` and `safeguards` may change, so that a run can go on on other devices.
- Paths are relative to where the command runs. `llmtune:starter` names what ships inside the package.

"""
TABLE = """| key | type | default | meaning |
|---|---|---|---|
"""
METHODS_HEAD = """
## Methods of `adapt`

`adapt` is a section, or a list of sections that are applied in order. Each names its `method`; the table above has the keys of
the default one, `lora`. [docs/transforms.md](transforms.md) says what the methods are.
"""
OPTIMIZERS_HEAD = """
## Optimizers

The section `optimizer` has the keys of the optimizer that its `name` chooses; the table above has those of the default one,
`adamw`. [docs/optimization.md](optimization.md) says when to take which.
"""


def configuration_page() -> str:
    """The whole page."""
    own = [row for row in key_reference() if "[" not in row[0].split(".")[0]]
    return HEAD + _table(own) + METHODS_HEAD + _choices(METHODS) + OPTIMIZERS_HEAD + _choices(OPTIMIZERS)


def _choices(kinds: dict[str, type]) -> str:
    return "".join(f"\n### {name}\n\n{kind.__doc__}\n\n{_table(key_reference(kind))}" for name, kind in kinds.items())


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = [
        f"| `{path}` | {kind.replace('|', 'or')} | {'required' if default == 'required' else f'`{default}`'} | {text} |"
        for path, kind, default, text in rows
    ]
    return TABLE + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(configuration_page(), encoding="utf-8")
