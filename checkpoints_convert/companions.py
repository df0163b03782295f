"""What lies beside the weights and goes with them: tokenizer, chat template, generation config, licence, notices.

Only regular files of the directory itself, or those of a hub cache that its links lead to: a link that leads elsewhere is
refused, as it is for weights, since what it leads to would be copied into an export under an innocent name.
"""

import re
import shutil
from pathlib import Path

from checkpoints_convert.safetensors_reader import checked_file

TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|chat_template.*"
    r"|tekken\.json|.*\.model|.*\.model\.v\d+.*",
    re.IGNORECASE,
)
NOTICES = re.compile(r"LICENSE.*|NOTICE.*|USE_POLICY.*", re.IGNORECASE)
COMPANIONS = re.compile(rf"{TOKENIZER.pattern}|generation_config\.json|{NOTICES.pattern}", re.IGNORECASE)
VOCABULARY = re.compile(r"tokenizer\.json|tekken\.json|.*\.model|.*\.model\.v\d+.*", re.IGNORECASE)


def companion_files(directory: Path, which: re.Pattern[str] = COMPANIONS) -> list[Path]:
    """The companions (or only `which`) by name. Raises LlmtuneFormatError for a link that leads out of the directory."""
    named = (file for file in sorted(directory.iterdir()) if which.fullmatch(file.name) and file.is_file())
    return [checked_file(directory, file.name) for file in named]


def copy_companions(source: Path, target: Path, which: re.Pattern[str] = COMPANIONS) -> None:
    """Tokenizer, generation config, chat template and licence files (or only `which`); never weights."""
    for file in companion_files(source, which):
        shutil.copyfile(file, target / file.name)


def replace_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer of `source`, and no file of another: two vocabularies side by side would be read as one."""
    for file in [file for file in target.iterdir() if TOKENIZER.fullmatch(file.name)]:
        file.unlink()
    copy_companions(source, target, TOKENIZER)


def has_tokenizer(directory: Path) -> bool:
    """Whether a vocabulary lies there, in whatever format."""
    return any(file.is_file() and VOCABULARY.fullmatch(file.name) for file in directory.iterdir())
