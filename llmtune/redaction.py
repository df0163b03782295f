"""Secrets never reach a file, a line of output or a service: what looks like one, or is one in this environment, is taken out.

    redact("https://me:pw@host/x")            'https://[redacted]@host/x'
    redact("sk-...")                           '[redacted]'

Three kinds are known: the values of environment variables whose names speak of secrets (WANDB_API_KEY, HF_TOKEN, ...), the
passwords of the netrc file, and texts of a form that only secrets have. It is a net under the tightrope, no licence to jump:
a secret that is none of these is not seen.
"""

import functools
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARK = "[redacted]"
SHORTEST = 8  # of a value that is looked for: shorter ones are words such as "true" or a port
NAMES = re.compile(
    r"TOKEN(?!I)|SECRET|PASSW|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|_(AUTH|KEY|PWD|PAT)$", re.IGNORECASE
)
FORMS = re.compile(
    r"(?<=://)[^\s/@'\"]+(?=@)"  # credentials in a URL
    r"|\b(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[abpr]-|sk-)[A-Za-z0-9_-]{24,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bAIza[0-9A-Za-z_-]{35}\b"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+"  # a JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----"
    r"|(?i:(?<=bearer )|(?<=[?&]token=)|(?<=[?&]sig=)|(?<=[?&]key=))[A-Za-z0-9._~+/%-]{8,}=*"
)


def redact(text: str) -> str:
    """The text with every secret in it replaced by a mark."""
    for value in _values(_environment()):
        text = text.replace(value, MARK)
    return FORMS.sub(MARK, text)


def redact_tree(value: Any) -> Any:
    """Lists and mappings of plain values, every text in them redacted."""
    if isinstance(value, Mapping):
        return {name: redact_tree(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_tree(own) for own in value]
    return redact(value) if isinstance(value, str) else value


def _environment() -> tuple[str, ...]:
    """Values of variables whose names speak of secrets, and the place of the netrc file; a key of the cache below."""
    named = (value for name, value in os.environ.items() if NAMES.search(name))
    return (os.environ.get("NETRC", "~/.netrc"), *sorted(named))


@functools.lru_cache(maxsize=4)
def _values(environment: tuple[str, ...]) -> tuple[str, ...]:
    """All secrets of this environment as they may stand in a text or in JSON, the longest first."""
    netrc, *values = environment
    found = {value for value in (*values, *_passwords(netrc)) if len(value) >= SHORTEST and not os.path.exists(value)}
    found |= {json.dumps(value)[1:-1] for value in found}
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def _passwords(netrc: str) -> list[str]:
    try:
        words = Path(netrc).expanduser().read_text(encoding="utf-8").split()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return []
    return [after for word, after in itertools.pairwise(words) if word == "password"]
