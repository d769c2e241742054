"""L2-SP: Li, Grandvalet & Davoine, Explicit inductive bias for transfer learning with convolutional networks, ICML 2018,
section 3, "L2-SP"."""

from torch import Tensor

from graphreg import Penalty


class L2SP(Penalty, keys=("l2_sp",), on="parameters"):
    """The mean square of a parameter's distance from where training began, averaged over the selected parameters: ``mean (w - w0)²``.

    w: [2 or more dims] -> 0-d, by default each parameter of 2 dims or more. ``weight`` >= 0. w0 is the parameter when the model was
    regularized; ``graphreg.reset_state(module)`` takes it anew, as after a checkpoint was loaded. ``rng_state`` saves it.

    Attributes:
        reduction: ``"mean"``, or ``"sum"``: the sum of (w - w0)² over all elements and parameters, as in the paper, without its factor ½.
    """

    reduction: str = "mean"

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        return {"start": like}

    def __call__(self, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        distance = (w - state["start"]).square()
        return distance.sum() if self.reduction == "sum" else distance.mean()
