"""Which licence a base model is under, and what it asks of a derivative.

Found, in this order: `export.license` of the run, the `license` of the base's own model card, the head of its licence file. What
none of them says is unknown, and said to be: a model's name proves nothing.

    Llama 3, 3.1, 3.2, 3.3   the derivative's name begins with "Llama" ("Llama 3"), a notice file, "Built with Llama", a copy of
                             the agreement (sections 1.b.i and 1.b.iii)
    Mistral's research and   no commercial use: a run must say that it keeps to that (`export.accept_license`)
    non-production licences
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from llmtune.errors import LlmtuneConfigError

META = "Copyright \N{COPYRIGHT SIGN} Meta Platforms, Inc. All Rights Reserved."
HEAD = 2000  # characters of a licence file that name it
UNKNOWN = "unknown"


@dataclass(frozen=True)
class License:
    """`key` as Hugging Face's cards write it. Of the duties, those that do not apply are None.

    `begins`: how a derivative's name must begin; `notice`: the text of its notice file; `shown`: what must be displayed;
    `limits`: what it forbids, which a run must accept; `heading`: by which its text is known.
    """

    key: str
    title: str
    heading: re.Pattern[str] | None = None
    begins: str | None = None
    notice: str | None = None
    shown: str | None = None
    limits: str | None = None

    @property
    def has_duties(self) -> bool:
        """Whether a derivative must do, or must not do, something that a free licence leaves open."""
        return (self.begins, self.notice, self.shown, self.limits) != (None,) * 4

    @property
    def listed(self) -> bool:
        """Whether Hugging Face's cards know the key."""
        return self.key not in ("mrl", "mnpl", UNKNOWN)


def _llama(key: str, title: str, heading: str, begins: str, shown: str, name: str) -> License:
    notice = f"{name} is licensed under the {title}, {META}"
    return License(key, title, re.compile(heading, re.IGNORECASE), begins, notice, shown)


LICENSES = {
    own.key: own
    for own in (
        _llama("llama3", "Meta Llama 3 Community License", r"META LLAMA 3 COMMUNITY LICENSE", "Llama 3",
               "Built with Meta Llama 3", "Meta Llama 3"),
        *(_llama(f"llama3.{minor}", f"Llama 3.{minor} Community License", rf"LLAMA 3\.{minor} COMMUNITY LICENSE", "Llama",
                 "Built with Llama", f"Llama 3.{minor}") for minor in (1, 2, 3)),
        License("apache-2.0", "Apache License 2.0", re.compile(r"Apache License\s+Version 2\.0")),
        License("mit", "MIT License", re.compile(r"\bMIT License\b")),
        License("mrl", "Mistral Research License", re.compile(r"Mistral AI Research License", re.IGNORECASE),
                limits="research only; commercial use of the model and of its derivatives is forbidden"),
        License("mnpl", "Mistral Non-Production License",
                re.compile(r"Mistral AI Non-Production License", re.IGNORECASE),
                limits="no production use: testing, research and personal use only, of derivatives too"),
        License(UNKNOWN, "unknown"),
    )
}  # fmt: skip
SPELLED = {
    "mistral-ai-research-license": "mrl",
    "mistral-research-license": "mrl",
    "mrl-0.1": "mrl",
    "mistral-ai-non-production-license": "mnpl",
    "mnpl-0.1": "mnpl",
}


@dataclass(frozen=True)
class Found:
    """A licence, how it was found, and the name that the derivative bears."""

    license: License
    how: str
    name: str


def settle_license(
    directory: Path | None, model: str, *, stated: str | None, accepted: bool, name: str | None, default_name: str
) -> Found:
    """The licence of a base model in `directory` (None: a preset with random weights), and the derivative's name.

    Raises LlmtuneConfigError where the name breaks a naming duty, where limits are not accepted, and where another licence is
    stated than the one with duties that lies beside the base.
    """
    found, how = find_license(directory)
    if stated and stated != found.key:
        if found.has_duties:
            raise LlmtuneConfigError(
                f"export.license: {stated} is stated, and {model} is under the {found.title}, known {how}, whose duties "
                "that would pass over; leave export.license out"
            )
        found, how = LICENSES[stated], "stated by export.license"
    if found.limits is not None and not accepted:
        raise LlmtuneConfigError(
            f"model: {model} is under the {found.title} ({found.limits}); to say that this use keeps to it, set "
            "export.accept_license: true"
        )
    begins = found.begins
    if name is None:
        return Found(
            found, how, default_name if begins is None or _begins(default_name, begins) else f"{begins} {default_name}"
        )
    if begins is not None and not _begins(name, begins):
        raise LlmtuneConfigError(
            f"export.name: the {found.title} wants names of derivatives to begin with {begins!r} (section 1.b.i); "
            f"write {f'{begins} {name}'!r}"
        )
    return Found(found, how, name)


def find_license(directory: Path | None) -> tuple[License, str]:
    """(licence, how it is known) of a directory's card and licence files."""
    if directory is None:
        return LICENSES[UNKNOWN], "random weights: no licence is passed on"
    card = directory / "README.md"
    key = _of_card(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    if key is not None:
        return LICENSES[key], "by the model card of the base"
    for file in sorted(directory.glob("LICENSE*")):
        head = file.read_text(encoding="utf-8", errors="replace")[:HEAD] if file.is_file() else ""
        for own in LICENSES.values():
            if own.heading is not None and own.heading.search(head):
                return own, f"by {file.name} of the base"
    return LICENSES[UNKNOWN], "neither a model card nor a licence file lies beside the base's weights"


def _of_card(text: str) -> str | None:
    """The key that a card's front matter names, where it is one of ours."""
    matter = re.match(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", text, re.DOTALL)
    try:
        front = yaml.safe_load(matter[1]) if matter else None
    except yaml.YAMLError:
        return None
    named = [front.get(key) for key in ("license", "license_name")] if isinstance(front, dict) else []
    keys = [SPELLED.get(str(own).lower(), str(own).lower()) for own in named]
    return next((key for key in keys if key in LICENSES and key != UNKNOWN), None)


def _begins(name: str, wanted: str) -> bool:
    """`Llama-3-8b` begins with `Llama 3`."""
    return name.replace("-", " ").replace("_", " ").startswith(wanted)
