"""DropHead, which drops attention heads."""

import math
from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Site, Splice

FUSED = (
    "nn.MultiheadAttention mixes its heads before it returns, so they cannot be dropped there: replace it by an attention that calls "
    "F.scaled_dot_product_attention, and select the result of that function."
)


class HeadDropout(Splice, keys=("head_dropout",)):
    """Zeroes whole attention heads at random, and scales the others so that the expectation is preserved.

    Formula: ``z m / (1 - weight)``, where m is 0 with probability ``weight``, else 1.
    Shapes: z [batch, heads, length, size], floating -> [same shape].

    Args:
        weight: The probability that a head is zeroed, 0 <= weight < 1.

    Raises:
        RegularizerError: A site is the output of an ``nn.MultiheadAttention``, which mixes its heads before it returns.

    Draws: one m for each head of each example.
    Default sites: the outputs of ``F.scaled_dot_product_attention``.
    Source: Zhou, Ge, Wei, Zhou & Xu, Scheduled DropHead: A regularization method for transformer models, EMNLP Findings 2020, section 3.
    The paper divides by the share of heads that are kept in an example. Here the divisor is 1 - weight, as in dropout, so that the result
    is also defined for an example that keeps no head.
    """

    usual = (
        "the outputs of scaled_dot_product_attention, which models of transformers call with attn_implementation='sdpa'; "
        "nn.MultiheadAttention mixes its heads before it returns, so it has none"
    )
    separable = "elements"

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if any(label.op == "scaled_dot_product_attention" for label in site.labels)]

    def why_not(self, site: Site) -> str:
        return FUSED if any(label.op == "MultiheadAttention" for label in site.labels) else ""

    def unfit(self, shape: Sequence[int]) -> str:
        return "" if len(shape) == 4 else f"the splice takes [batch, heads, length, size]. {FUSED}"

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"{math.prod(1 - p for p in weights):.3g} of it is kept, not {1 - max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * noise.keep(z, weight, shared=(2, 3)) / (1 - weight)
