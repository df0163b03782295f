"""The rotary part of a config.json <-> `Rope`.

    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, ...}}            transformers 4
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, ...}}         transformers 5

A field that is not known to a rope type is an error. `dynamic` and `longrope` are refused: their frequencies depend on the
longest position in the batch, so that packed, cached and plain rows would differ.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from checkpoints_convert.hf_fields import flag, number, positive, short, wrong
from llmtune.errors import LlmtuneFormatError
from llmtune.models.config import LinearScaling, Llama3Scaling, QueryScaling, Rope, Scaling, YarnScaling

BETA, ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"
SUPPORTED = "default, linear, llama3 or yarn"
BATCH_DEPENDENT = ("dynamic", "longrope")
Fields = Mapping[str, Any]


def parse_rope(config: Fields, where: str, theta: float, scales_queries: bool) -> Rope:
    """`theta`: where the file names none. `scales_queries`: the architecture has a position-dependent query scale."""
    field, scaling = _section(config, where)
    for inside, other in (("rope_theta", config.get("rope_theta")), ("rope_type", scaling.get("type"))):
        if other is not None and inside in scaling and scaling[inside] != other:
            raise wrong(where, f"{field}.{inside}", scaling[inside], f"{short(other)}, as the other spelling says")
    base = number(scaling if "rope_theta" in scaling else config, "rope_theta", where, theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str):
        raise wrong(where, f"{field}.rope_type", kind, SUPPORTED)
    if kind in BATCH_DEPENDENT:
        raise wrong(where, f"{field}.rope_type", kind, f"{SUPPORTED}: frequencies of {kind} depend on the batch")
    if kind not in READERS:
        raise wrong(where, f"{field}.rope_type", kind, SUPPORTED)
    names, read = READERS[kind]
    known = {"rope_theta", "rope_type", "type", *names}
    if scaling.get("partial_rotary_factor") == 1.0:
        known.add("partial_rotary_factor")
    if scales_queries:
        known |= {BETA, "max_position_embeddings"}  # the latter only repeats the field outside
    unknown = sorted(set(scaling) - known)
    if unknown:
        raise LlmtuneFormatError(f"{where}: unknown field {field}.{short(unknown[0])} with rope_type {kind!r}")
    if ORIGINAL in names and config.get(ORIGINAL) not in (None, scaling.get(ORIGINAL)):
        raise wrong(where, ORIGINAL, config[ORIGINAL], f"the same as {field}.{ORIGINAL}")
    queries = _query_scaling(scaling, field, kind, where) if scales_queries else None
    return Rope(base, read(scaling, field, where), queries)


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """The older spelling; for models that only transformers 5 knows (they scale queries), the newer one."""
    scaling = None if rope.scaling is None else {"rope_type": NAMES[type(rope.scaling)], **_given(rope.scaling)}
    if rope.query_scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": scaling}
    return {"rope_parameters": {"rope_theta": rope.theta, **(scaling or {}), BETA: rope.query_scaling.beta}}


def _given(scaling: Scaling) -> dict[str, Any]:
    return {name: value for name, value in asdict(scaling).items() if value is not None}


def _section(config: Fields, where: str) -> tuple[str, Fields]:
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    field = "rope_parameters" if new is not None else "rope_scaling"
    if new is not None and old is not None:
        raise wrong(where, "rope_scaling", old, "null beside rope_parameters: they are two spellings of the same")
    scaling = new if new is not None else ({} if old is None else old)
    if not isinstance(scaling, Mapping):
        raise wrong(where, field, scaling, "an object or null")
    return field, scaling


def _query_scaling(scaling: Fields, field: str, kind: str, where: str) -> QueryScaling:
    if kind != "yarn" or BETA not in scaling:
        name = "rope_type" if kind != "yarn" else BETA
        raise wrong(where, f"{field}.{name}", scaling.get(name), f"rope_type yarn with {BETA} in this architecture")
    return QueryScaling(
        number(scaling, BETA, where, None, f"{field}."), positive(scaling, ORIGINAL, where, prefix=f"{field}.")
    )


def _default(scaling: Fields, field: str, where: str) -> None:
    del scaling, field, where


def _linear(scaling: Fields, field: str, where: str) -> LinearScaling:
    return LinearScaling(number(scaling, "factor", where, None, f"{field}.", least=1.0))


def _llama3(scaling: Fields, field: str, where: str) -> Llama3Scaling:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (number(scaling, name, where, None, f"{field}.") for name in names)
    if high <= low:
        raise wrong(where, f"{field}.high_freq_factor", high, f"more than low_freq_factor {low}")
    return Llama3Scaling(factor, low, high, positive(scaling, ORIGINAL, where, prefix=f"{field}."))


def _yarn(scaling: Fields, field: str, where: str) -> YarnScaling:
    def optional(name: str) -> float | None:
        return None if scaling.get(name) is None else number(scaling, name, where, None, f"{field}.")

    fast, slow = (
        number(scaling, name, where, own, f"{field}.") for name, own in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if fast < slow:
        raise wrong(where, f"{field}.beta_fast", fast, f"at least beta_slow {slow}")
    return YarnScaling(
        number(scaling, "factor", where, None, f"{field}.", least=1.0),
        positive(scaling, ORIGINAL, where, prefix=f"{field}."),
        fast,
        slow,
        optional("attention_factor"),
        optional("mscale"),
        optional("mscale_all_dim"),
        flag(scaling, "truncate", where, True, f"{field}."),
    )


Reader = Callable[[Fields, str, str], Scaling | None]
READERS: dict[str, tuple[tuple[str, ...], Reader]] = {  # rope type -> (its fields, how they are read)
    "default": ((), _default),
    "linear": (("factor",), _linear),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), _llama3),
    "yarn": (
        ("factor", ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"), _yarn,
    ),
}  # fmt: skip
NAMES = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}
