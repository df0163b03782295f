"""`llmtune COMMAND`: parse, compose, call. A user's mistake is one line on stderr and exit code 2.

Heavy imports happen inside the commands, so that `llmtune --help` is immediate.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import llmtune
from llmtune import exit_codes
from llmtune.errors import LlmtuneError
from llmtune.export_command import add_export
from llmtune.failures import refuse, tell
from llmtune.huge_pages import restart_with_huge_pages
from llmtune.plan_command import add_plan
from llmtune.redaction import redact
from llmtune.train_command import add_train

if TYPE_CHECKING:
    from llmtune.model import Model


def start() -> int:
    """The program: `main`, for training in a process with large pages."""
    if sys.argv[1:2] == ["train"]:
        restart_with_huge_pages()
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """One command within a process that is there already; returns the exit code."""
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not getattr(options, "takes_overrides", False):
        parser.error(f"unknown argument {overrides[0]!r}")
    options.overrides = overrides
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.excepthook = _print_traceback
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `llmtune inspect ... | head`: who reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.UNREAD
    except (Exception, KeyboardInterrupt) as error:
        code = tell(error, getattr(options, "interrupted", ""))
        if code is None:
            raise
        return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="llmtune", description="Fine-tune LLaMA 3 and Mistral in JAX, on TPU pods and GPUs with the same code."
    )
    parser.add_argument("--version", action="version", version=f"llmtune {llmtune.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_train(commands)
    generate = commands.add_parser("generate", help="continue prompts with a model")
    generate.add_argument("model", metavar="MODEL", help="a Hugging Face directory, or a run directory of llmtune")
    generate.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="repeat for a batch")
    generate.add_argument(
        "--adapter", action="append", default=[], metavar="DIR", help="a PEFT directory, applied on top"
    )
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    generate.add_argument("--top-k", type=int, default=None, metavar="K")
    generate.add_argument("--top-p", type=float, default=None, metavar="P")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end a completion before this text"
    )
    generate.add_argument("--chat", action="store_true", help="prompts are a user's turns, through the chat template")
    generate.add_argument("--system", default=None, metavar="TEXT", help="with --chat: the system's turn before them")
    generate.add_argument(
        "--chat-template",
        default=None,
        metavar="NAME",
        help="with --chat: a built-in one or a .jinja file, not the adapter's or the model's",
    )
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--dtype", default="float32", metavar="D", help="of weights and compute; default float32")
    generate.add_argument(
        "--strategy", default=None, metavar="NAME", help="sharding over all devices, e.g. fsdp, tensor"
    )
    generate.set_defaults(run=_generate)
    _add_convert(commands)
    add_export(commands)
    add_plan(commands)

    inspect = commands.add_parser(
        "inspect",
        help="what a model is: parameters, memory, FLOPs, cache, and what its config implies",
        description="What a model is, from its config.json alone: no weight is read.",
    )
    inspect.add_argument("model", metavar="MODEL", help="a Hugging Face directory, or a preset of configs/models")
    inspect.add_argument(
        "--length", type=int, default=None, metavar="N", help="tokens of a row, for attention and cache; default 4096"
    )
    inspect.set_defaults(run=_inspect)

    report = commands.add_parser(
        "report",
        help="the page of a run, or of two side by side",
        description="Write the page of a run, finished or not, from what is on disk; of two runs, a page that compares them.",
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="the output directory of a run; two are compared")
    report.add_argument(
        "--output",
        default=None,
        metavar="FILE",
        help="default: RUN/report.html; of two: RUN/comparison-with-OTHER.html",
    )
    report.set_defaults(run=_report)
    return parser


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="between Hugging Face's, Meta's and Mistral's checkpoint layouts, or into shards of another size",
        description="Convert a checkpoint directory, bit for bit and in bounded memory. DST appears complete or not at all.",
    )
    convert.add_argument("source", metavar="SRC", help="a directory in Hugging Face's, Meta's or Mistral's layout")
    convert.add_argument("target", metavar="DST", help="a directory that does not exist yet, or is empty")
    layouts = ("hf", "meta", "mistral")
    convert.add_argument("--to", choices=layouts, default="hf", help="the layout of DST; default hf")
    convert.add_argument(
        "--from",
        choices=layouts,
        default=None,
        dest="layout",
        help="the layout of SRC; default: found out",
    )
    convert.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of safetensors files; default 5GB")
    convert.add_argument(
        "--files",
        type=int,
        default=1,
        metavar="N",
        help="with --to meta: tensor-parallel files; default 1",
    )
    convert.add_argument("--dtype", default=None, metavar="D", help="float32, bfloat16 or float16; default: as stored")
    convert.add_argument(
        "--rope-scaling-factor", type=float, default=None, metavar="F",
        help="what Meta's params.json leaves out: 8 for Llama 3.1 and 3.3, 32 for Llama 3.2",
    )  # fmt: skip
    convert.add_argument(
        "--like",
        default=None,
        metavar="MODEL",
        help="a preset or Hugging Face directory: SRC must agree with its config.json, and gets it",
    )
    convert.add_argument(
        "--verify",
        action="store_true",
        help="read DST back and compare every tensor's digest, and logits, before it appears",
    )
    convert.set_defaults(run=_convert, interrupted="; nothing was kept")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse prints its usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(exit_codes.USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _generate(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape

    from llmtune.model import load

    if not options.chat and (options.system, options.chat_template) != (None, None):
        return refuse("--system and --chat-template belong to --chat; add it")
    console = Console(stderr=True)  # the spinner shows in a terminal only; completions alone go to stdout
    with console.status(f"reading {escape(options.model)}") as status:
        model = load(options.model, adapters=options.adapter, dtype=options.dtype, strategy=options.strategy)
        status.update(f"generating up to {options.max_new_tokens} tokens")
        if options.chat:
            texts = _answers(model, options)
        else:
            completions = _complete(model, options.prompt, options)
            texts = [prompt + completion for prompt, completion in zip(options.prompt, completions, strict=True)]
    for text in texts:
        print(text)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from llmtune.conversion import convert
    from llmtune.training.display import Display

    with Display() as display:
        done = [0]

        def begin(name: str, total: int) -> None:
            done[0] = 0
            display.phase(f"{name}, MB", max(1, total // 10**6))

        def progress(count: int) -> None:
            before, done[0] = done[0], done[0] + count
            if done[0] // 10**6 > before // 10**6:
                display.advance(done[0] // 10**6 - before // 10**6)

        lines = convert(
            options.source,
            options.target,
            to=options.to,
            source_layout=options.layout,
            max_shard_size=options.max_shard_size,
            files=options.files,
            dtype=options.dtype,
            rope_scaling_factor=options.rope_scaling_factor,
            like=options.like,
            verify=options.verify,
            begin=begin,
            progress=progress,
        )
        for line in lines:
            display.note(line)
    return 0


def _answers(model: "Model", options: argparse.Namespace) -> list[str]:
    from llmtune.chat import find_template, with_ends
    from llmtune.model import decode_completion
    from llmtune.tokenizers.turns import chat_prompt

    template = find_template(model, options.model, options.chat_template, options.adapter)
    rows = [chat_prompt(template, prompt, options.system) for prompt in options.prompt]
    completions = _complete(with_ends(model, template), rows, options)
    return [decode_completion(model.tokenizer, *pair) for pair in zip(rows, completions, strict=True)]


def _complete(model: "Model", prompts: list, options: argparse.Namespace) -> list:
    return model.generate(
        prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop,
        seed=options.seed,
    )


def _inspect(options: argparse.Namespace) -> int:
    from llmtune.inspection import inspect

    print("\n".join(inspect(options.model, options.length)))
    return 0


def _report(options: argparse.Namespace) -> int:
    if len(options.runs) > 2:
        raise LlmtuneError(f"report: {len(options.runs)} runs are given; give one, or two to compare")
    from llmtune.evaluation.report import summarize, write_comparison, write_report

    if len(options.runs) == 1:
        path = write_report(options.runs[0], options.output)
    else:
        path = write_comparison(options.runs[0], options.runs[1], options.output)
    print(summarize(*options.runs))
    print(f"report: {path}")
    return 0


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of a defect, as ever, but for secrets in its text."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


if __name__ == "__main__":
    sys.exit(start())
