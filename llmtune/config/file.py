"""YAML <-> `Run`, strictly: numbers as people write them, every mistake named by its path and, for typos, the nearest key."""

import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from llmtune.config import Run, check, key_reference
from llmtune.config.adapt import METHODS
from llmtune.config.optimizers import OPTIMIZERS
from llmtune.errors import LlmtuneConfigError

LIMIT_BYTES, LIMIT_DEPTH = 1_000_000, 20
LIMIT_VALUES = 10_000  # keys and values of a file that somebody wrote: reading them takes well below a second
UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")


class StrictLoader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans, no duplicate keys, no anchors, no tags; at most so many keys and values."""

    most: float = math.inf
    values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses aliases (a few lines of them can expand to gigabytes), tags, deep nesting, and values without end."""
        event = self.peek_event()
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise LlmtuneConfigError(f"{line}: YAML anchors and aliases are not read here; write the value out")
        if event.tag is not None:
            raise LlmtuneConfigError(
                f"{line}: YAML tags are not read here; remove {event.tag.replace('tag:yaml.org,2002:', '!!')}"
            )
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > LIMIT_DEPTH:
            raise LlmtuneConfigError(f"nested more than {LIMIT_DEPTH} deep")
        self.values += 1
        if self.values > self.most:
            raise LlmtuneConfigError(f"{line}: more than {self.most:,} keys and values; this is no configuration")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rsplit(":", 1)[-1] == "null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


class StrictDumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or `StrictLoader` would read as something else, such as 1e-5; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Two sections may share a default, which is written out for each."""
        del data
        return True


StrictDumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + StrictLoader.yaml_implicit_resolvers.get(first, [])
    for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **StrictLoader.yaml_implicit_resolvers}
}


def _text_node(dumper: StrictDumper, text: str) -> yaml.ScalarNode:
    style = '"' if set(text) & set("\x85\u2028\u2029") else None  # line breaks to YAML, which other styles lose
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


StrictDumper.add_representer(str, _text_node)


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(name, str):
            raise LlmtuneConfigError(f"line {line}: the key {name!r} is not a name")
        if name in result:
            raise LlmtuneConfigError(f"line {line}: the key {name!r} stands twice; remove one of them")
        result[name] = loader.construct_object(value_node, deep=True)
    return result


StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """The run of a YAML file, with `--section.key value` (or `--section.key=value`) pairs put over it."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        if len(raw) > LIMIT_BYTES:
            raise LlmtuneConfigError(f"{path}: larger than {LIMIT_BYTES:,} bytes; this is no configuration")
        tree = parse_yaml(raw.decode("utf-8"), str(path), LIMIT_VALUES)
    except OSError as error:
        raise LlmtuneConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise LlmtuneConfigError(f"{path}: not UTF-8 (byte {error.start})") from None
    if not isinstance(tree, dict):
        raise LlmtuneConfigError(f"{path}: a mapping of keys to values is expected")
    for name, value in parse_overrides(overrides):
        _put(tree, name, value)
    return build_run(tree, str(path))


def parse_yaml(text: str, where: str, most: float = math.inf) -> Any:
    """One document, by `StrictLoader`, of at most so many keys and values: a run's own file has all defaults beside them."""
    try:
        loader = StrictLoader(text)
        loader.most = most
        return loader.get_single_data()
    except LlmtuneConfigError as error:
        raise LlmtuneConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not valid YAML"
        raise LlmtuneConfigError(f"{where}: {line}{problem}") from None
    except (ValueError, RecursionError) as error:
        raise LlmtuneConfigError(f"{where}: not valid YAML ({error})") from None


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """[(dotted key, value)]; values are read as YAML."""
    pairs, rest = [], list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--"):
            raise LlmtuneConfigError(f"{name!r}: overrides are written --section.key value")
        name, given, value = name[2:].partition("=")
        if not given:
            if not rest:
                raise LlmtuneConfigError(f"--{name}: a value is missing after it")
            value = rest.pop(0)
        if not all(name.split(".")):
            raise LlmtuneConfigError(f"'--{name}': overrides are written --section.key value")
        pairs.append((name, parse_yaml(value, f"--{name}")))
    return pairs


def build_run(tree: Mapping[str, Any], where: str) -> Run:
    """Validate a nested mapping. Raises LlmtuneConfigError for the first thing that is wrong."""
    try:
        run: Run = _validate(Run, {name: own for name, own in tree.items() if name not in ("adapt", "optimizer")})
        run = dataclasses.replace(
            run,
            adapt=_read_methods(tree.get("adapt"), "adapt", METHODS),
            optimizer=_read_method(tree.get("optimizer", {}), "optimizer", OPTIMIZERS, by="name"),
        )
        check(run)
    except LlmtuneConfigError as error:
        raise LlmtuneConfigError(f"{where}: {error}") from None
    return run


def _validate(kind: type, tree: Mapping[str, Any], at: str = "") -> Any:
    """The dataclass of one section, or of the whole run (`at` "")."""
    try:
        return _adapter(kind).validate_json(json.dumps(tree))
    except ValidationError as error:
        # a typo also makes a key missing; of the branches of a union, the one that was got furthest into was meant
        found = min(error.errors(), key=lambda one: (one["type"] not in UNKNOWN_KEY, -len(one["loc"])))
        raise LlmtuneConfigError(_explain(found, kind, f"{at}." if at else "")) from None


def _read_methods(given: Any, at: str, methods: Mapping[str, type]) -> Any:
    """A section `{method: NAME, ...}`, or a list of them, each as the dataclass of its method; the first is the default."""
    if given is None:
        return None
    if isinstance(given, list):
        return [_read_method(own, f"{at}.{number}", methods) for number, own in enumerate(given)]
    return _read_method(given, at, methods)


def _read_method(given: Any, at: str, methods: Mapping[str, type], by: str = "method") -> Any:
    """One section, as the dataclass that its key `by` names; the first of the methods where it has none."""
    if not isinstance(given, dict):
        raise LlmtuneConfigError(f"{at}: {_shown(given)} is not a section of keys")
    name = given.get(by, next(iter(methods)))
    if not isinstance(name, str) or name not in methods:
        near = difflib.get_close_matches(str(name).lower(), methods, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(methods)}"
        raise LlmtuneConfigError(f"{at}.{by}: {_shown(name)} is no {at if by == 'name' else by}; {hint}")
    return _validate(methods[name], given, at)


def dump_run(run: Run) -> str:
    """YAML that loads back to an equal run, every default written out."""
    return dump_tree(plain(run))


def dump_tree(tree: Any) -> str:
    """YAML that `parse_yaml` reads back as it was."""
    return yaml.dump(tree, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=120)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train": {"steps": 2}}` -> `{"train.steps": 2}`."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value for name, child in tree.items() for key, value in flat(child, f"{prefix}.{name}".lstrip(".")).items()
    }


@functools.cache
def _adapter(kind: type) -> TypeAdapter:
    """Pydantic over the plain dataclasses: unknown keys forbidden, no coercion (its strict mode reads objects from JSON only)."""
    for section in _sections(kind):
        section.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, populate_by_name=False)  # type: ignore[attr-defined]
    return TypeAdapter(kind)


def _sections(kind: type) -> list[type]:
    inner = [part for hint in get_type_hints(kind).values() for part in _leaves(hint)]
    return [kind, *(found for part in inner if dataclasses.is_dataclass(part) for found in _sections(part))]  # type: ignore[arg-type]


def _leaves(hint: Any) -> list[Any]:
    """The types that a union, or a list of one, is made of."""
    return [leaf for part in getattr(hint, "__args__", ()) for leaf in _leaves(part)] or [hint]


def plain(value: Any) -> Any:
    """A run, or a part of it, as mappings, lists and plain values."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    entries = (
        (entry.metadata.get("alias", entry.name), getattr(value, entry.name)) for entry in dataclasses.fields(value)
    )
    return {name: plain(own) for name, own in entries if not (own is None and name in ("adapt", "sharding"))}


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        below = tree.get(section)
        if below is None:
            below = tree[section] = {}
        if not isinstance(below, dict):
            raise LlmtuneConfigError(f"--{name}: {section} is no section")
        tree = below
    tree[last] = value


def _explain(error: Any, kind: type, at: str) -> str:
    """One line from pydantic's first finding in a section of this kind, whose keys begin with `at`."""
    found, given = error["type"], error.get("input")
    if found == "json_invalid":  # all that YAML can say and JSON cannot
        return "a text holds a lone surrogate, which is no character"
    if found in UNKNOWN_KEY:
        named = [str(part) for part in error["loc"] if part == "str" or not _is_branch(part)]
        path = ".".join("[]" if part.isdecimal() else part for part in named)
        path = path if path.isprintable() else json.dumps(path)  # a line break in a key would be two lines
        known = [row[0] for row in key_reference(kind)]
        if path in known:
            return f"{path}: written as one key; write {path.replace('.', ': {', 1)}: ...}}"
        known += sorted({prefix for row in known for prefix in _prefixes(row)})
        near = difflib.get_close_matches(path.lower(), known, n=1, cutoff=0.6)
        return f"{at}{path}: unknown key" + (
            f"; did you mean {at}{near[0]}?" if near else "; llmtune train --help lists all keys"
        )
    path = at + ".".join(str(part) for part in error["loc"] if not _is_branch(part))
    if found in ("missing", "missing_argument"):
        return f"{path}: this key is required"
    expected = error["msg"].removeprefix("Input should be ").replace("an object", "a section of keys")
    return f"{path}: {_shown(given)} is not {expected}"


def _shown(given: Any) -> str:
    text = json.dumps(given, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _is_branch(part: Any) -> bool:
    """Pydantic names the branch of a union in the location of an error."""
    return isinstance(part, str) and (
        part in ("str", "DataSource", "Quantize", "Continuing") or part.startswith("list[")
    )
