"""`llmtune export`: will a server take an adapter, and adapters and models in a form that it takes.

llmtune export ADAPTER --check vllm
llmtune export ADAPTER --pad-rank 16 --output DIR
llmtune export RUN --quantize fp8 --output DIR
llmtune export ONE OTHER --combine ties --weights 0.7,0.3 --output DIR
"""

import argparse
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneConfigError
from llmtune.shipped import resolve

COMBINATIONS = ("cat", "svd", "linear", "ties", "dare", "ties_svd", "dare_svd")


def add_export(commands: Any) -> None:
    """The parser of the command."""
    export = commands.add_parser(
        "export",
        help="check an adapter for vLLM, change its rank, combine several; a model in 8 bits",
        description="PEFT adapters as files: whether vLLM loads one and what to change, one rank for all modules, arithmetic.",
    )
    export.add_argument(
        "adapters",
        metavar="ADAPTER",
        nargs="+",
        help="a PEFT directory, or a run of llmtune; with --quantize, a model or a run",
    )
    export.add_argument(
        "--check", choices=("vllm",), default=None, help="say whether it loads there, and what to change"
    )
    export.add_argument(
        "--pad-rank", type=int, default=None, metavar="N", help="one rank for all modules, by zeros: exact"
    )
    export.add_argument(
        "--compress-rank", type=int, default=None, metavar="N", help="one rank for all modules, by the nearest matrices"
    )
    export.add_argument("--combine", choices=COMBINATIONS, default=None, help="how several adapters become one")
    export.add_argument(
        "--weights", default=None, metavar="W,W", help="with --combine: one for each; default: equal, of sum 1"
    )
    export.add_argument(
        "--rank", type=int, default=None, metavar="N", help="with --combine ..svd: the rank of the result"
    )
    export.add_argument(
        "--density", type=float, default=0.5, metavar="D", help="with ties and dare: the share that stays"
    )
    export.add_argument("--seed", type=int, default=0, help="with dare: of what is dropped")
    export.add_argument(
        "--model", default=None, metavar="MODEL", help="the base model; default: the one that ADAPTER names"
    )
    export.add_argument(
        "--quantize",
        choices=("int8", "fp8"),
        default=None,
        help="of a model or a run: its merged model in 8 bits, in the compressed-tensors layout of vLLM and transformers",
    )
    export.add_argument("--output", default=None, metavar="DIR", help="where the adapter, or the model, is written")
    export.set_defaults(run=run_export)


def run_export(options: argparse.Namespace) -> int:
    """Carry the command out; 1 where --check finds something in the way."""
    if options.quantize is not None:
        return _quantize(options)
    from llmtune.origin import adapter_of

    paths = [adapter_of(Path(path)) for path in options.adapters]
    wanted = [name for name in ("check", "pad_rank", "compress_rank", "combine") if getattr(options, name) is not None]
    if len(wanted) != 1:
        raise LlmtuneConfigError("export: give one of --check, --pad-rank, --compress-rank, --combine and --quantize")
    if wanted == ["check"]:
        return _check(paths)
    if options.output is None:
        raise LlmtuneConfigError("export: --output is missing; give a directory that does not exist yet")
    if wanted != ["combine"] and len(paths) > 1:
        raise LlmtuneConfigError("export: a rank is changed of one adapter at a time; give one")
    from llmtune import pretrained

    config = pretrained.open_source(options.model or pretrained.base_of(paths[0])).config
    output = Path(options.output)
    if options.combine is None:
        rank = options.pad_rank or options.compress_rank
        if rank is None or rank < 1:
            raise LlmtuneConfigError("export: a rank must be 1 or more")
        moved = pretrained.resize_adapter(
            paths[0], output, config, rank=rank, compress=options.compress_rank is not None
        )
        print(f"adapter: {output} (rank {rank}; its products moved by {moved:.2%} of their norm at most)")
        return 0
    weights = [1 / len(paths)] * len(paths) if options.weights is None else _numbers(options.weights)
    more = {"rank": options.rank, "density": options.density, "seed": options.seed}
    pretrained.combine_adapter_files(paths, output, config, weights, options.combine, **more)
    print(f"adapter: {output} ({options.combine} of {len(paths)})")
    return 0


def _check(paths: list[Path]) -> int:
    from llmtune import pretrained

    blocked = False
    for path in paths:
        found = pretrained.check_adapter(path)
        blocked |= any(one.blocks for one in found)
        verdict = "vLLM will not serve it as it is" if any(one.blocks for one in found) else "vLLM loads it"
        print("\n".join([f"{path}: {verdict}", *(f"  {one.what}: {one.mend}" for one in found)]))
    return 1 if blocked else 0


def _quantize(options: argparse.Namespace) -> int:
    from llmtune import pretrained
    from llmtune.provenance import carry_papers

    others = [name for name in ("check", "pad_rank", "compress_rank", "combine") if getattr(options, name) is not None]
    if others or len(options.adapters) > 1:
        raise LlmtuneConfigError("export: --quantize takes one model or run, and no other option but --output")
    if options.output is None:
        raise LlmtuneConfigError("export: --output is missing; give a directory that does not exist yet")
    path, output = resolve(options.adapters[0]), Path(options.output)
    model = path / "export" / "model" if (path / "export" / "model").is_dir() else path
    if model == path and (path / "export" / "adapter").is_dir():
        raise LlmtuneConfigError(
            f"export: {path} has no model, since its adapter cannot be merged; give its base, or another run"
        )
    if not (model / "config.json").is_file():
        raise LlmtuneConfigError(f"export: {path} is no model (it has no config.json); give a model, or a finished run")
    matrices = pretrained.export_quantized(model, output, options.quantize)
    carry_papers(
        model, output, f"Its matrices were then kept in {options.quantize} (compressed-tensors, a scale per output)."
    )
    print(f"model: {output} ({matrices} matrices in {options.quantize}, one scale per output; compressed-tensors)")
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise LlmtuneConfigError(f"export: --weights {text!r} is not a list of numbers such as 0.7,0.3") from None
