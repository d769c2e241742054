"""Slow states: the mean squared change of a state from step to step, theanets' ``RecurrentState``.

It is the temporal coherence loss of Jonschkowski & Brock, Autonomous Robots 39 (2015), and, averaged over units, the temporal
activation regularization of Merity, McCann & Socher, ICLR workshop 2017.
"""

from torch import Tensor

from graphreg import Penalty, mean_over_pairs


class RecurrentState(Penalty, keys=("recurrent_state",)):
    """The mean squared difference of neighbouring steps: ``mean (z_t - z_t-1)²``.

    steps: [time, batch, units] -> 0-d, averaged over sites, and at each site over the units and all pairs of neighbouring steps of
    all sequences together, so that a long sequence weighs more. A single step gives 0. ``weight`` >= 0. A selector is required.

    Attributes:
        time_axis: The axis of time, for a value that does not come from a recurrent layer.
        lengths: The name of the model's input that holds the lengths: whole numbers [batch], or a bool mask [batch, time] that is
            True where a step counts (torch's padding masks are the opposite). All other steps are ignored.

    Raises:
        RegularizerError: The value is not a sequence, or the lengths do not fit it.
    """

    time_axis: int = 1
    lengths: str | None = None

    def __call__(self, steps: Tensor, lengths: Tensor | None) -> Tensor:
        return mean_over_pairs(steps.diff(dim=0).square(), lengths)
