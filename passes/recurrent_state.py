"""A penalty on fast changes of states."""

from torch import Tensor

from graphreg import Penalty, mean_over_pairs


class RecurrentState(Penalty, keys=("recurrent_state",)):
    """Penalizes changes of a state from one step to the next.

    Formula: ``(z_t - z_t-1)²``. A sequence of a single step gives 0.
    Shapes: steps [time, batch, units] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        time_axis: The axis of time of a value that does not come from a recurrent layer. For the output of such a layer, the layer
            determines the axis.
        lengths: The name of the model's input that has the lengths of the sequences, whole numbers [batch], or a bool mask [batch, time]
            that is True where a step counts (the padding masks of torch are the opposite). All other steps are ignored. None means that
            every step counts.

    Raises:
        RegularizerError: A value is not a sequence, or the lengths do not fit it.

    Averaged over: the units and all pairs of neighbouring steps of all sequences together, so that a long sequence weighs more; then the
    sites.
    Default sites: none. Give a selector of sequences.
    Source: theanets' ``RecurrentState``. It is the temporal coherence loss of Jonschkowski & Brock, Autonomous Robots 39 (2015), and,
    averaged over the units, the temporal activation regularization of Merity, McCann & Socher, ICLR workshop 2017.
    """

    time_axis: int = 1
    lengths: str | None = None

    def __call__(self, steps: Tensor, lengths: Tensor | None) -> Tensor:
        return mean_over_pairs(steps.diff(dim=0).square(), lengths)
