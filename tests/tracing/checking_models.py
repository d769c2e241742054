"""Models that check shapes themselves. In a file of tests, pytest would rewrite their assertions."""

from __future__ import annotations

from torch import Tensor, nn


class Checks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim > 1, f"{x.ndim} axes"
        if x.shape[-1] != 4:
            raise ValueError(f"{x.shape[-1]} features, {'many' if x.shape[-1] > 4 else 'few'}")
        assert x.shape[0] < 10 and x.shape[1] > 1
        if x.shape[0] == 0 or x.shape[1] == 5:
            message = "no rows"
            raise RuntimeError(message)
        rows, columns, device = *x.shape[:2], x.device
        return self.layer(x).to(device).reshape(*x.shape[-2:]) * (rows + columns)


class Catches(Checks):
    """It catches the error of its check, and goes on in another way."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            assert x.shape[0] > 3
        except AssertionError:
            return -self.layer(x)
        return self.layer(x)


class Branches(Checks):
    """A condition behind which no error is raised, one on values, and one of several that together decide."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 0 and x.shape[0] > 3:
            return -self.layer(x)
        if self.kind == 1:
            assert x.sum() > 0
        if self.kind == 2:
            assert x.shape[0] > 3 or x.shape[1] > 3
        return self.layer(x)
