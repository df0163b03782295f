"""tokenizer_config.json and its neighbours: which tokens begin and end a text, and whether BOS is put first."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneFormatError


@dataclass(frozen=True)
class Settings:
    """As a directory says; None where it does not."""

    bos: str | None
    eos: str | None
    add_bos: bool | None
    eos_ids: tuple[int, ...]  # of generation_config.json, else config.json
    bos_id: int | None  # likewise


def read_settings(directory: Path) -> Settings:
    """From tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json, as far as present."""
    own, special = read_object(directory / "tokenizer_config.json"), read_object(directory / "special_tokens_map.json")
    generation, model = read_object(directory / "generation_config.json"), read_object(directory / "config.json")
    eos = next((c["eos_token_id"] for c in (generation, model) if c.get("eos_token_id") is not None), None)
    bos = next((c["bos_token_id"] for c in (model, generation) if c.get("bos_token_id") is not None), None)
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in [*eos_ids, 0 if bos is None else bos]):
        raise LlmtuneFormatError(f"{directory}: bos_token_id {bos!r} and eos_token_id {eos!r} must be token ids")
    return Settings(
        bos=_content("bos_token", own, special, directory),
        eos=_content("eos_token", own, special, directory),
        add_bos=own.get("add_bos_token"),
        eos_ids=tuple(eos_ids),
        bos_id=bos if bos is not None and bos >= 0 else None,
    )


def ending_ids(settings: Settings, id_of: Callable[[str], int | None], fallback: int | None) -> tuple[int, ...]:
    """Eos ids, the tokenizer's own eos first: it is the one that ends a training row."""
    own = id_of(settings.eos) if settings.eos is not None else fallback
    first = () if own is None else (own,)
    return tuple(dict.fromkeys((*first, *settings.eos_ids)))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LlmtuneFormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise LlmtuneFormatError(f"{path}: a JSON object is expected")
    return value


def _content(name: str, own: dict[str, Any], special: dict[str, Any], directory: Path) -> str | None:
    token = own.get(name, special.get(name))
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str | None) or (token is not None and content is None):
        raise LlmtuneFormatError(f"{directory}: {name} is {token!r}; the text of a token is expected")
    return content
