"""L2-SP, weight decay towards the weights at the start of training."""

from torch import Tensor

from graphreg import Penalty


class L2SP(Penalty, keys=("l2_sp",), on="parameters"):
    """Penalizes the distance of a parameter from its value at the start of training.

    Formula: ``(w - w0)²``, where w0 is the value that the parameter had when the model was regularized. ``graphreg.reset_state(module)``
    sets w0 to the present value, for example after a checkpoint was loaded. w0 is in no ``state_dict``, but in the result of
    ``graphreg.rng_state``.
    Shapes: w [2 or more dims] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        reduction: ``"mean"``, or ``"sum"`` for the sum over all elements of all parameters.

    Averaged over: the elements of each parameter, then the parameters.
    Default sites: the parameters of 2 dims or more, without biases and norms.
    Source: Li, Grandvalet & Davoine, Explicit inductive bias for transfer learning with convolutional networks, ICML 2018, section 3,
    "L2-SP". The paper multiplies the sum by ½.
    """

    reduction: str = "mean"

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        return {"start": like}

    def __call__(self, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        distance = (w - state["start"]).square()
        return distance.sum() if self.reduction == "sum" else distance.mean()

    def slope(self, elements: int) -> float:
        """Return the derivative of the formula at a distance of 1."""
        return 2.0 if self.reduction == "sum" else 2 / elements
