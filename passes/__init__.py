"""The built-in regularizers, one file each.

The imports are for type checkers and readers: the registry of regularizers does not need the imports, because it scans this folder.
Begin with ``weight_l1.py``, a penalty, and ``gaussian_noise.py``, a splice. A penalty measures values or parameters. A splice replaces
values or parameters by others.

The docstrings of the classes have these entries:

- Formula, Shapes: what ``__call__`` computes. z is the value at a site (a named place in the model); w is a parameter. ``units`` is
  the value at a site, too: a penalty gets it as a matrix [samples, units], a splice with the axis of units moved to the end.
- Args: the options of the class. ``Regularizer`` documents the options that all classes have.
- Averaged over: what a penalty is a mean over, in this order. With ``reduction="sum"``, the numbers are added instead: those of one site
  by the class, then those of all sites by the engine.
- Draws: how many random numbers a splice draws.
- Default sites: where the class acts if the user gives no selector. A hidden value lies between two layers with weights: it
  was computed from the output of one layer, and the other layer reads it. A value has the axes of a convolution's output if it is such an
  output, or was computed from one by operations that keep the axes, such as a ReLU, or bring them back, such as two permutations.
- Source: the paper.
"""

from graphreg.passes.alpha_dropout import AlphaDropout
from graphreg.passes.bernoulli_dropout import BernoulliDropout
from graphreg.passes.channel_dropout import ChannelDropout
from graphreg.passes.concrete_dropout import ConcreteDropout
from graphreg.passes.confidence_penalty import ConfidencePenalty
from graphreg.passes.contractive import Contractive
from graphreg.passes.covariance import Covariance
from graphreg.passes.decov import DeCov
from graphreg.passes.drop_block import DropBlock
from graphreg.passes.drop_connect import DropConnect
from graphreg.passes.drop_path import DropPath
from graphreg.passes.elastic_net import ElasticNet
from graphreg.passes.embedding_dropout import EmbeddingDropout
from graphreg.passes.gaussian_dropout import GaussianDropout
from graphreg.passes.gaussian_noise import GaussianNoise
from graphreg.passes.group_lasso import GroupLasso
from graphreg.passes.head_dropout import HeadDropout
from graphreg.passes.hidden_l1 import HiddenL1
from graphreg.passes.hidden_l2 import HiddenL2
from graphreg.passes.hoyer_square import HoyerSquare
from graphreg.passes.kl_sparsity import KLSparsity
from graphreg.passes.l0_gates import L0Gates
from graphreg.passes.l2_sp import L2SP
from graphreg.passes.layer_drop import LayerDrop
from graphreg.passes.locked_dropout import LockedDropout
from graphreg.passes.max_norm import MaxNorm
from graphreg.passes.neftune import NEFTune
from graphreg.passes.orthogonality import Orthogonality
from graphreg.passes.recurrent_norm import RecurrentNorm
from graphreg.passes.recurrent_state import RecurrentState
from graphreg.passes.spectral_penalty import SpectralPenalty
from graphreg.passes.variance_floor import VarianceFloor
from graphreg.passes.weight_l1 import WeightL1
from graphreg.passes.weight_l2 import WeightL2
from graphreg.passes.weight_noise import WeightNoise
from graphreg.passes.z_loss import ZLoss
from graphreg.passes.zoneout import Zoneout

__all__ = [
    "L2SP", "AlphaDropout", "BernoulliDropout", "ChannelDropout", "ConcreteDropout", "ConfidencePenalty", "Contractive", "Covariance",
    "DeCov",
    "DropBlock", "DropConnect", "DropPath", "ElasticNet", "EmbeddingDropout", "GaussianDropout", "GaussianNoise", "GroupLasso",
    "HeadDropout", "HiddenL1", "HiddenL2", "HoyerSquare", "KLSparsity", "L0Gates", "LayerDrop", "LockedDropout", "MaxNorm", "NEFTune",
    "Orthogonality", "RecurrentNorm", "RecurrentState", "SpectralPenalty", "VarianceFloor", "WeightL1", "WeightL2", "WeightNoise",
    "ZLoss", "Zoneout",
]  # fmt: skip
