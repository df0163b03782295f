"""Generation: one compiled prefill, then one compiled loop that decodes a few tokens at a time.

Prompts of any lengths are padded on the left, so that every row's next token has the same index and one write serves the
batch; padding belongs to segment 0, which nobody sees, and positions count from each row's own first token. Lengths are
rounded up to a few sizes, so that the number of compilations stays small.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmtune.errors import LlmtuneConfigError
from llmtune.freed_memory import give_back_freed_memory
from llmtune.generation.cache import Cache, attend_and_fill, attend_to_cache, empty_cache
from llmtune.generation.layers import Arrange, for_one_call
from llmtune.generation.sampling import Sampling, draw, greedy
from llmtune.models.config import ModelConfig
from llmtune.models.language_model import LanguageModel
from llmtune.sharding import Strategy, axis_size, placed_by_compiler, put, spec
from llmtune.weights import linear

SLICE = 32  # tokens decoded between two looks from the host
LARGE = 8e6  # bytes of a cache that are given back to the system at the end of a call, which takes some milliseconds


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """Everything a decoding loop carries. `index`: where in the rows the last chosen token stands, same for all."""

    index: jax.Array  # int32 []
    last: jax.Array  # int32 [batch], chosen but not yet read by the model
    done: jax.Array  # bool [batch]
    segment_ids: jax.Array  # int32 [batch, length], 0 on padding
    positions: jax.Array  # int32 [batch], of `last`
    keys: jax.Array  # [batch] random keys
    cache: Cache


@dataclass(frozen=True)
class Engine:
    """Generates from one model on one mesh. `arrange`: how layers lie while it does (`layers.py`)."""

    config: ModelConfig
    bind: Callable[[Any], LanguageModel]
    mesh: Mesh
    strategy: Strategy
    arrange: Callable[[Mesh], Arrange] = for_one_call

    def generate(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        eos_ids: Sequence[int],
        seed: int = 0,
        finished: Callable[[list[int]], bool] = lambda completion: False,
    ) -> list[list[int]]:
        """Completions without the eos that ended them. `finished(completion)` may end a row early (stop strings)."""
        _check(prompts, self.config.vocab_size, max_new_tokens)
        virtual = self.bind(params).decoder().virtual_tokens()
        rows = _left_padded(prompts, multiple=axis_size(self.mesh, self.strategy.spec("batch")[0]), virtual=virtual)
        length = rows.tokens.shape[1] + _round_up(max_new_tokens, SLICE)
        arrange, on_cpu = self.arrange(self.mesh), self.mesh.devices.flat[0].platform == "cpu"
        prefill, decode = _compiled(self.bind, self.config, self.strategy, sampling, tuple(eos_ids), length, arrange)
        out: list[list[int]] = [[] for _ in prompts]
        over = np.array([False] * len(prompts))
        with jax.set_mesh(self.mesh):
            layout = NamedSharding(self.mesh, self.strategy.spec("batch", "seq"))
            tokens, segments, positions = (put(x, layout) for x in (rows.tokens, rows.segment_ids, rows.positions))
            weights, state = prefill(params, tokens, segments, positions, jnp.int32(seed))
            while not over.all():
                state, chosen = decode(weights, state)
                for row, new in enumerate(np.asarray(chosen)[: len(prompts)]):
                    if not over[row]:
                        over[row] = _extend(out[row], new, eos_ids, max_new_tokens, finished)
        large = sum(own.nbytes for own in jax.tree.leaves(state.cache)) > LARGE
        del weights, state
        if on_cpu and large:
            give_back_freed_memory()
        return out


@dataclass(frozen=True)
class _Rows:
    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


def _left_padded(prompts: Sequence[Sequence[int]], multiple: int, virtual: int) -> _Rows:
    """int32 [batch, seq]: prompts at the right end of rows of a rounded length; rows without a prompt fill up `batch`.

    `virtual`: so many places before each prompt belong to the model's virtual tokens.
    """
    batch, longest = _round_up(len(prompts), multiple), virtual + max(map(len, prompts))
    seq = max(16, 1 << (longest - 1).bit_length()) if longest <= 512 else _round_up(longest, 256)
    tokens = np.zeros((batch, seq), np.int32)
    segment_ids = np.zeros((batch, seq), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, seq - len(prompt) :] = prompt
        segment_ids[row, seq - len(prompt) - virtual :] = 1
    positions = np.maximum(np.cumsum(segment_ids, axis=1, dtype=np.int32) - 1, 0)
    return _Rows(tokens, segment_ids, positions)


@functools.lru_cache(maxsize=32)
def _compiled(
    bind: Callable[[Any], LanguageModel],
    config: ModelConfig,
    strategy: Strategy,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    length: int,
    arrange: Arrange,
) -> tuple[Callable, Callable]:
    """Prefill and decode of one setting; kept, so that a second call of the same shape compiles nothing."""
    arranged = arrange(bind, config)
    select = greedy if sampling.temperature == 0.0 else draw

    def choose(model: LanguageModel, hidden: jax.Array, keys: jax.Array, positions: jax.Array) -> jax.Array:
        """Hidden [batch, 1, embed] -> the next token of each row, which will stand at `positions` [batch]."""
        logits = linear(hidden, model.decoder().head_weight(), ("batch", "seq", "act_vocab")).astype(jnp.float32)

        def pick(logits: jax.Array, keys: jax.Array, positions: jax.Array) -> jax.Array:
            return select(logits[:, 0], jax.vmap(jax.random.fold_in)(keys, positions), sampling)

        return placed_by_compiler(pick, "batch")(logits, keys, positions)

    def prefill(params: Any, tokens: jax.Array, segments: jax.Array, positions: jax.Array, seed: jax.Array) -> Decoding:
        with strategy.active():
            model = bind(params)
            batch, seq = tokens.shape
            cache = empty_cache(config, batch, length, model.dtype)
            hidden, cache, _ = model.decoder().hidden(
                tokens, positions, attend_and_fill(segments), cache=cache, dtype=model.dtype
            )
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))
            index = jnp.int32(seq)
            following = positions[:, -1] + 1
            last = choose(model, hidden[:, -1:], keys, following)
            alive = segments[:, -1]
            grown = jnp.concatenate([segments, jnp.broadcast_to(alive[:, None], (batch, length - seq))], axis=1)
            return Decoding(index, last, alive == 0, grown, following, keys, cache)

    def one(params: Any, state: Decoding) -> Decoding:
        model = arranged.bind(params)
        attend = attend_to_cache(state.segment_ids, state.index)
        hidden, cache, _ = model.decoder().hidden(
            state.last[:, None], state.positions[:, None], attend, cache=state.cache, dtype=model.dtype
        )
        following = choose(model, hidden, state.keys, state.positions + 1)
        done = state.done | functools.reduce(jnp.logical_or, [state.last == eos for eos in eos_ids], state.done)
        return Decoding(state.index + 1, following, done, state.segment_ids, state.positions + 1, state.keys, cache)

    def decode(params: Any, state: Decoding) -> tuple[Decoding, jax.Array]:
        """Up to SLICE tokens of every row, [batch, SLICE]; what follows a row's eos means nothing."""
        with strategy.active():
            tokens = jnp.zeros((state.last.shape[0], SLICE), jnp.int32, out_sharding=spec("batch", "seq"))

            def body(carry: tuple[jax.Array, Decoding, jax.Array]) -> tuple[jax.Array, Decoding, jax.Array]:
                count, state, tokens = carry
                tokens = jax.lax.dynamic_update_slice(tokens, state.last[:, None], (jnp.int32(0), count))
                return count + 1, one(params, state), tokens

            def unfinished(carry: tuple[jax.Array, Decoding, jax.Array]) -> jax.Array:
                count, state, _ = carry
                return (count < SLICE) & ~state.done.all()

            _, state, tokens = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, tokens))
            return state, jax.sharding.reshard(tokens, PartitionSpec())  # every process reads all of them

    read_prompts = jax.jit(prefill)

    def begin(params: Any, *rows: jax.Array) -> tuple[Any, Decoding]:
        """Weights as decoding reads them, and its first state."""
        state = read_prompts(params, *rows)
        return arranged.weights(params), replace(state, cache=arranged.cache(state.cache))

    return begin, jax.jit(decode, donate_argnums=1)


def _extend(
    completion: list[int], new: np.ndarray, eos_ids: Sequence[int], limit: int, finished: Callable[[list[int]], bool]
) -> bool:
    """Append new tokens to a completion; True when it has ended."""
    for token in new.tolist():
        if token in eos_ids or len(completion) == limit:
            return True
        completion.append(token)
        if finished(completion):
            return True
    return len(completion) == limit


def _check(prompts: Sequence[Sequence[int]], vocab_size: int, max_new_tokens: int) -> None:
    if not prompts:
        raise LlmtuneConfigError("prompts: the list is empty; give at least one prompt")
    if max_new_tokens < 1:
        raise LlmtuneConfigError(f"max_new_tokens: {max_new_tokens} must be at least 1")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise LlmtuneConfigError(f"prompt {number}: it has no tokens; begin with the BOS token at least")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise LlmtuneConfigError(f"prompt {number}: token ids must lie in 0..{vocab_size - 1}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
