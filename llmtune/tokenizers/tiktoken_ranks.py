"""Byte-pair ranks, run by the tiktoken library: Llama 3's `tokenizer.model` and Mistral's `tekken.json`.

A `tokenizer.model` has lines of "base64 rank"; the pattern that cuts texts and the 256 control tokens behind the ranks are
Meta's and stand in no file. A `tekken.json` tells its own pattern; its control tokens come first, the ranks after them.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import tiktoken

from llmtune.errors import LlmtuneDataError, LlmtuneFormatError
from llmtune.tokenizers.protocol import require_characters
from llmtune.tokenizers.settings import Settings, ending_ids, read_object, read_settings

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS = 128_000
LLAMA3_CONTROLS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)  # fmt: skip
TEKKEN_CONTROLS = (  # of files that do not list them (up to version 7), as mistral-common has it
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
LONGEST = 500_000  # blanks in a row; the engine of the pattern gives up near 1,000,000, with a panic


@final
@dataclass(frozen=True)
class TiktokenRanks:
    """tiktoken reads control tokens out of a text only where it is told to."""

    encoding: tiktoken.Encoding
    controls: dict[str, int]
    control_ids: frozenset[int]
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool

    def encode(self, text: str, *, bos: bool = True, allow_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        return self.encode_batch([text], bos=bos, allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, bos: bool = True, allow_special: bool = False) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        for text in texts:
            require_characters(text)
            _require_breaks(text)
        rows = self._rows(list(texts), allow_special)
        return [[self.bos_id, *ids] for ids in rows] if bos and self.bos_id is not None else rows

    def encode_spans(self, text: str, *, allow_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """See `Tokenizer.encode_spans`."""
        ids = self.encode(text, bos=False, allow_special=allow_special)
        character: Sequence[int] = range(len(text))  # of each byte
        if not text.isascii():
            character = [i for i, c in enumerate(text) for _ in range(len(c.encode("utf-8")))]
        spans, begin = [], 0
        for token in ids:
            end = begin + len(self.encoding.decode_single_token_bytes(token))
            spans.append((character[begin], character[end - 1] + 1))
            begin = end
        return ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self.encoding.decode(
            [int(i) for i in ids if 0 <= i < self.vocab_size and int(i) not in self.control_ids], errors="replace"
        )

    def _rows(self, texts: list[str], allow_special: bool) -> list[list[int]]:
        if len(texts) == 1:
            return [self._one(texts[0], allow_special)]
        if allow_special:
            return self.encoding.encode_batch(texts, allowed_special="all", disallowed_special=())
        return self.encoding.encode_ordinary_batch(texts)

    def _one(self, text: str, allow_special: bool) -> list[int]:
        if allow_special:
            return self.encoding.encode(text, allowed_special="all", disallowed_special=())
        return self.encoding.encode_ordinary(text)


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins like lines of "base64 rank"."""
    with path.open("rb") as file:
        head = file.read(64).split(b"\n", 1)[0].rstrip(b"\r")
    token, _, rank = head.partition(b" ")
    return bool(token) and rank.isdigit()


def read_tiktoken(path: Path) -> TiktokenRanks:
    """The tokenizer of Llama 3 from its `tokenizer.model`; BOS and EOS are Meta's where no settings stand beside it."""
    ranks = _ranks_of_lines(path)
    if len(ranks) != LLAMA3_RANKS:
        raise LlmtuneFormatError(
            f"{path}: {len(ranks)} ranks, where Llama 3 has {LLAMA3_RANKS}; the file is cut off, or of another model, "
            "whose pattern it does not tell: put that model's tokenizer.json beside it"
        )
    settings = read_settings(path.parent)
    controls = {name: len(ranks) + i for i, name in enumerate(_llama_names(path.parent, len(ranks)))}
    meta = [controls[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>") if name in controls]
    eos_ids = ending_ids(settings, controls.get, None)
    bos = settings.bos if settings.bos is not None else "<|begin_of_text|>"
    return _tokenizer(path, LLAMA3_PATTERN, ranks, controls, settings, controls.get(bos), eos_ids or tuple(meta))


def read_tekken(path: Path) -> TiktokenRanks:
    """The tokenizer of a `tekken.json`."""
    content = read_object(path)
    try:
        config = content["config"]
        size, count = int(config["default_vocab_size"]), int(config["default_num_special_tokens"])
        listed = content.get("special_tokens")
        names = [str(t["token_str"]) for t in listed] if listed is not None else list(TEKKEN_CONTROLS)
        if [t["rank"] for t in listed or []] != list(range(len(listed or []))):
            raise ValueError("the ranks of special_tokens are not 0, 1, 2, ...")
        vocabulary = content["vocab"][: size - count]
        if len(vocabulary) != size - count or len(names) > count:
            raise ValueError(f"{len(vocabulary)} ranks and {len(names)} special tokens do not make {size} tokens")
        if [t["rank"] for t in vocabulary] != list(range(len(vocabulary))):
            raise ValueError("the ranks of vocab are not 0, 1, 2, ...")
        ranks = {base64.b64decode(t["token_bytes"], validate=True): t["rank"] + count for t in vocabulary}
        pattern = str(config["pattern"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise LlmtuneFormatError(f"{path}: not a Tekken tokenizer ({said[:200]})") from None
    names += [f"<SPECIAL_{i}>" for i in range(len(names), count)]
    controls = {name: i for i, name in enumerate(names)}
    settings = read_settings(path.parent)
    bos = settings.bos if settings.bos is not None else "<s>"
    eos_ids = ending_ids(settings, controls.get, controls.get("</s>"))
    return _tokenizer(path, pattern, ranks, controls, settings, controls.get(bos), eos_ids)


def _require_breaks(text: str) -> None:
    if len(text) > LONGEST and re.search(rf"\s{{{LONGEST}}}", text):
        raise LlmtuneDataError(
            f"the text holds a run of more than {LONGEST} blanks, which tiktoken cannot cut; clean it"
        )


def _tokenizer(
    path: Path,
    pattern: str,
    ranks: dict[bytes, int],
    controls: dict[str, int],
    settings: Settings,
    bos_id: int | None,
    eos_ids: tuple[int, ...],
) -> TiktokenRanks:
    if not all(bytes([i]) in ranks for i in range(256)):
        raise LlmtuneFormatError(f"{path}: not every byte has a rank; the file is damaged")
    try:
        encoding = tiktoken.Encoding(
            path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=controls,
            explicit_n_vocab=len(ranks) + len(controls),
        )  # fmt: skip
    except (ValueError, AssertionError) as error:
        raise LlmtuneFormatError(f"{path}: its ranks make no tokenizer ({str(error)[:200]})") from None
    return TiktokenRanks(
        encoding,
        controls,
        frozenset(controls.values()),
        vocab_size=len(ranks) + len(controls),
        bos_id=bos_id,
        eos_ids=eos_ids,
        add_bos=bos_id is not None if settings.add_bos is None else bool(settings.add_bos),
    )


def _ranks_of_lines(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            decoded = base64.b64decode(token, validate=True)
        except binascii.Error:
            decoded = b""
        if not decoded or rank != b"%d" % len(ranks) or decoded in ranks:
            raise LlmtuneFormatError(f"{path}:{number}: not a line of tiktoken ranks; the file is damaged or cut off")
        ranks[decoded] = len(ranks)
    return ranks


def _llama_names(directory: Path, first: int) -> tuple[str, ...]:
    """The 256 control tokens: Meta's, or those that tokenizer_config.json lists (their names differ between releases)."""
    listed: dict[str, Any] = read_object(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    names = list(LLAMA3_CONTROLS)
    for key, token in listed.items() if isinstance(listed, dict) else ():
        at = int(key) - first if key.isdigit() else -1
        if 0 <= at < len(names) and isinstance(token, dict) and isinstance(token.get("content"), str):
            names[at] = token["content"]
    if len(set(names)) != len(names):
        raise LlmtuneFormatError(f"{directory / 'tokenizer_config.json'}: added_tokens_decoder names a token twice")
    return tuple(names)
