"""Splices on DTensors: each rank replaces its own shard, and draws its part of the mask for the whole value."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphreg.errors import RegularizerError
from graphreg.runtime.rank_layout import from_part, is_dtensor, like_part, made_whole, require_separable, shard_window, within


def on_shards(
    splice: Any, z: Any, key: Tensor, inputs: dict[str, Any], clock: Tensor | None, others: dict[str, Tensor]
) -> Tensor:
    """Replace a DTensor. Return a DTensor with the same placements, except that partial sums are added up first.

    The mask is the one that a single process would draw for the whole value, so that the result does not depend on the placements.

    Args:
        splice: The splice, a ``SpliceRule``.
        z: The DTensor.
        key: The splice's row of the keys, int32 [2].
        inputs: The inputs of the model that the formula takes; none are allowed.
        clock: As in ``SpliceRule.forward``.
        others: As in ``SpliceRule.forward``; they must be DTensors.

    Raises:
        RegularizerError: The value is a parameter, the formula cannot be applied to a part of a value, or an argument is not allowed.
        GraphRegError: The value is divided in another way than ``Shard`` says.
    """
    if splice.on_parameter:
        raise RegularizerError(
            f"{splice.description}: the parameter is sharded here (DTensor), so that each rank would draw for a part of it. Apply "
            "fully_shard to the whole module alone, not to its submodules, so that its forward has whole parameters; or leave the "
            "parameter out."
        )
    if inputs:
        option = next(iter(inputs))
        raise RegularizerError(
            f"{splice.description}: the value is a DTensor, and the input that {option}= names is not divided as it is. Leave {option}= "
            "out, or the site."
        )
    if plain := [name for name, value in others.items() if not is_dtensor(value)]:
        what = "module" if plain[0] == "module_input" else "cell"
        raise RegularizerError(f"{splice.description}: the value is a DTensor, and the {what} gets a plain tensor. Leave the site out.")
    z = made_whole(z)
    place = shard_window(z)
    require_separable(splice.regularizer, place, splice.description)
    local = {name: like_part(value, z) for name, value in others.items()}
    place = within(place, z, splice.cuts, splice.description)
    part = splice.replaced(z.to_local(), splice.key_among(key, z.device_mesh), place, {}, clock, local)
    whole: Tensor = from_part(part, z)
    return whole
