"""A penalty on fast changes of states."""

from torch import Tensor

from graphreg import ModelInput, Penalty, mean_over_pairs


class RecurrentState(Penalty, keys=("recurrent_state",)):
    """Penalizes changes of a state from one step to the next.

    Formula: ``(z_t - z_t-1)²``. A sequence of a single step gives 0.
    Shapes: steps [time, batch, units] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        time_axis: The axis of time in a value. For the output of a recurrent layer, leave it out: ``batch_first`` of the layer determines
            the axis.
        lengths: The name of an input of the model. The input has the lengths of the sequences, whole numbers [batch], or is a mask
            [batch, time] that is 1 or True where a step counts (torch's padding masks are True where a step does not count). All other
            steps are left out, so the steps before and after a gap are neighbours. None means that every step counts.

    Raises:
        RegularizerError: A value is not a sequence, or the lengths do not fit the value.

    Averaged over: the units and all pairs of neighbouring steps in all sequences of the batch, so a long sequence counts more; then the
    sites.
    Default sites: none. Give a selector of sequences.
    Source: theanets' ``RecurrentState``. Jonschkowski & Brock, Autonomous Robots 39 (2015), call the formula temporal coherence loss. Its
    mean over the units is the temporal activation regularization of Merity, McCann & Socher, ICLR workshop 2017.
    """

    time_axis: int = 1
    lengths: ModelInput = None

    def __call__(self, steps: Tensor, lengths: Tensor | None) -> Tensor:
        return mean_over_pairs(steps.diff(dim=0).square(), lengths)

    def slope(self, elements: int) -> float:
        """Return the derivative of the formula at a change of 1."""
        return 2 / elements
