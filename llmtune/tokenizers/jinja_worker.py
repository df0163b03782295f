"""The process in which chat templates are rendered; run by its path, it imports nothing of llmtune.

Jinja cannot be bounded from inside: `{{ 'a' * 10 ** 10 }}` is one call into C. So a template lives in a process of its own that
has no files, no environment, 256 MiB of address space, and a timer whose signal ends it whatever it is doing.

In and out are frames: four bytes of length, then JSON. The first frame is the template; then lists of jobs, a job being a
list of renders that share the time, each answered by one frame.
"""

import json
import os
import re
import resource
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, BinaryIO, ClassVar, final

MEMORY = 256 * 2**20
SECONDS = 0.75  # for a job: all renders of one conversation
# what the first rendering would import, while files can be opened
WARM_UP = r"""{% set a = '\n' ~ "%s" % 1 %}{{ [a] | tojson | trim | upper }}{{ strftime_now('%d %b %Y') }}"""
OUTPUT = 8 * 2**20  # characters of one rendering: more than any model reads


def confine() -> None:
    """Give up memory, files, forks and core dumps, for good."""
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),  # stdin, stdout and stderr are open; nothing more can be
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def environment(marks: tuple[str, str]) -> Any:
    """The sandbox, with what transformers offers to templates; `{% generation %}` leaves marks around its body."""
    import jinja2
    import jinja2.debug  # what it would import at the first mistake of a template, when no file can be opened any more
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    @final
    class Generation(Extension):
        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            return marks[0] + caller() + marks[1]

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    @final
    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, given = args[0], dict(*args[1:], **kwargs)
            for name in given:
                public(name)
            jinja2.utils.Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            jinja2.utils.Namespace.__setitem__(self, public(name), value)

    def public(name: Any) -> Any:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with _: {name!r}")
        return name

    def new_dict(*args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        namespace=Namespace,
        dict=new_dict,
    )
    return made


def rendered(template: Any, variables: Mapping[str, Any]) -> str:
    """The text, given up as soon as it is too long."""
    parts, length = [], 0
    for part in template.generate(**variables):
        parts.append(part)
        length += len(part)
        if length > OUTPUT:
            raise OverflowError
    return "".join(parts)


def without_marks(text: str, marks: tuple[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where the bodies of `{% generation %}` stand in it."""
    parts = re.split("(" + "|".join(marks) + ")", text)
    kept, at, begin, spans = [], 0, 0, []
    for part in parts:
        if part == marks[0]:
            begin = at
        elif part == marks[1]:
            spans.append((begin, at))
        else:
            kept.append(part)
            at += len(part)
    return "".join(kept), spans


def answer(template: Any, render: Mapping[str, Any], marks: tuple[str, str]) -> dict[str, Any]:
    """One rendering, and its beginnings: the conversation up to each message asked for, with its prompt.

    A beginning is told by its length, or where the text begins otherwise, as it is; None where the template refuses it.
    """
    variables = render["variables"]
    text, spans = without_marks(rendered(template, variables), marks)
    starts: list[int | str | None] = []
    for stop in render["prefixes"]:
        shorter = {**variables, "messages": variables["messages"][:stop], "add_generation_prompt": True}
        try:
            prefix, _ = without_marks(rendered(template, shorter), marks)
        except Exception:
            starts.append(None)
            continue
        starts.append(len(prefix) if text.startswith(prefix) else prefix)
    return {"text": text, "spans": spans, "starts": starts}


def guarded(work: Callable[[], Any]) -> dict[str, Any]:
    """What a piece of work gives, or why it does not; the timer ends the process where it takes too long."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return {"given": work()}
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY // 2**20} MiB of memory"}
    except OverflowError:
        return {"failed": f"its output is longer than {OUTPUT} characters"}
    except RecursionError:
        return {"failed": "it nests too deeply"}
    except Exception as error:
        said = " ".join(str(error)[:400].split())
        line = getattr(error, "lineno", None)
        return {"failed": f"{said or type(error).__name__}" + (f" (line {line} of the template)" if line else "")}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def read(stream: BinaryIO) -> Any:
    """The next frame; None at the end."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    return json.loads(stream.read(struct.unpack(">I", head)[0]))


def write(stream: BinaryIO, value: Any) -> None:
    """One frame. ASCII: a rendering may hold lone surrogates, which the parent refuses by name."""
    raw = json.dumps(value).encode("ascii")
    stream.write(struct.pack(">I", len(raw)) + raw)
    stream.flush()


def main() -> None:
    """Serve one template until the parent hangs up."""
    marks = (f"mb{os.urandom(16).hex()}", f"me{os.urandom(16).hex()}")
    made = environment(marks)
    made.from_string(WARM_UP).render()
    confine()
    inward, outward = sys.stdin.buffer, sys.stdout.buffer
    source = read(inward)
    if source is None:
        return
    template = None

    def compile_it() -> None:
        nonlocal template
        template = made.from_string(source)

    write(outward, guarded(compile_it))
    while (jobs := read(inward)) is not None:
        for job in jobs:
            write(outward, guarded(lambda job=job: [answer(template, render, marks) for render in job]))


if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])
    main()
