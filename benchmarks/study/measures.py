"""What is measured in a trained network, in plain torch and scikit-learn. Shares and accuracies are in per cent."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from study.training import Fitted

BINS = 15  # of the calibration error


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).float().mean())


def entropy(logits: Tensor) -> float:
    """The mean entropy of the predicted distributions, in nats."""
    log_p = logits.log_softmax(1)
    return -float((log_p.exp() * log_p).sum(1).mean())


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """The expected calibration error, in per cent, with BINS bins of equal width (Guo et al. 2017)."""
    confidence, guess = logits.softmax(1).max(1)
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS).index_add_(0, place, (guess == labels).float() - confidence)
    return 100 * float(gaps.abs().sum()) / len(labels)


def attacked(fitted: Fitted, x: Tensor, y: Tensor, size: float) -> float:
    """Accuracy after one step of ``size`` along the sign of the gradient of the loss (Goodfellow et al. 2015)."""
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(fitted.module(leaf).output, y), leaf)
    return accuracy(fitted(x + size * gradient.sign()), y)


def correlation(units: Tensor) -> float:
    """The mean absolute correlation of two different units [samples, units]; units that never change are left out."""
    alive = units[:, units.std(0) > 1e-6]
    if alive.shape[1] < 2:
        return 0.0
    matrix = torch.corrcoef(alive.T).abs()
    count = len(matrix)
    return float((matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1)))


def halved(net: nn.Sequential) -> nn.Sequential:
    """A copy without the half of the units of each hidden layer that have the smallest norms, of what leads in times what leads out."""
    pruned = copy.deepcopy(net)
    layers = [layer for layer in pruned if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, following in pairwise(layers):
            scores = layer.weight.norm(dim=1) * following.weight.norm(dim=0)
            following.weight[:, scores.argsort()[: len(scores) // 2]] = 0
    return pruned


def closed_gates(module: nn.Module) -> float:
    """The share of the gates of ``l0_gates`` that are 0 in eval mode; 0 for a module without gates. Louizos et al. 2018, equation 13."""
    logs = [p.detach() for name, p in module.named_parameters() if name.endswith("log_alpha")]
    return 100 * float((torch.sigmoid(torch.cat(logs)) * 1.2 - 0.1 <= 0).float().mean()) if logs else 0.0


def probe(train: tuple[Tensor, Tensor], *tests: tuple[Tensor, Tensor]) -> list[float]:
    """Accuracies of a logistic regression on standardized features."""
    scaler = StandardScaler().fit(train[0].double().numpy())
    model = LogisticRegression(max_iter=500).fit(scaler.transform(train[0].double().numpy()), train[1].numpy())
    return [100 * float(model.score(scaler.transform(x.double().numpy()), y.numpy())) for x, y in tests]
