"""What a block keeps for the backward pass, by the name that a run gives."""

from collections.abc import Callable

import jax

POLICIES: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda block: block,  # every intermediate result
    "block": jax.checkpoint,  # only the block's input: all else is computed again
    "dots": lambda block: jax.checkpoint(  # results of matmuls with weights, not attention's
        block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}
