"""What a path names, before anything of it is read: a model, a preset, or a run of llmtune over a base of its own.

base_of("path/to/hf_dir")    Base("path/to/hf_dir")
base_of("runs/loftq")        Base("runs/loftq/export/base", adapters=(...,))          where the adapter stands on codes of its own
base_of("runs/qlora")        Base("path/to/hf_dir", adapters=(runs/qlora/export/adapter,), kept=quantize("nf4"))
"""

from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import LlmtuneConfigError
from llmtune.transforms import Transform, identity, quantize_each


def adapter_of(path: Path) -> Path:
    """The adapter of a run, where the path is that of a run."""
    return path / "export" / "adapter" if (path / "export" / "adapter").is_dir() else path


@dataclass(frozen=True)
class Base:
    """What a model is read from; `kept`: how its matrices are quantised; `untied`: its head was parted from the embedding."""

    model: str
    adapters: tuple[Path, ...] = ()
    kept: Transform = identity
    untied: bool = False


def base_of(path: str | Path, kept: Transform = identity) -> Base:
    """What a path names; `kept`: how the matrices of a model are quantised. Those of a run are, as they trained."""
    run = _run_directory(Path(path))
    if run is not None and kept is not identity:
        raise LlmtuneConfigError(f"quantize: {path} is a run, whose base is kept as it trained; leave it out")
    return run or Base(str(path), kept=kept)


def _run_directory(path: Path) -> Base | None:
    """What a finished run of llmtune made of its base; None for any other directory."""
    if not (path / "config.yaml").is_file() or (path / "config.json").exists():
        return None
    model, adapter = path / "export" / "model", path / "export" / "adapter"
    if not model.is_dir() and not adapter.is_dir():
        raise LlmtuneConfigError(
            f"{path}: this run has no export yet; let it finish (the same train command resumes it)"
        )
    if not adapter.is_dir():
        return Base(str(model))
    if (path / "export" / "base").is_dir():
        return Base(str(path / "export" / "base"), (adapter,))
    from llmtune.config.adapt import unties
    from llmtune.config.file import load_run
    from llmtune.config.quantize import kept

    run = load_run(path / "config.yaml", ())
    return Base(run.model, (adapter,), quantize_each(kept(run.quantize)), unties(run.adapt))
