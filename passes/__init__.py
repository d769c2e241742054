"""The built-in regularizers, one file each.

The imports are for type checkers and readers: the registry does not need them, because it scans this folder. To begin, read
``weight_l1.py``, a penalty (it measures values or parameters), and ``gaussian_noise.py``, a splice (it replaces them).

Each class has a docstring of the same form: what the class does; the formula and the shapes; the options; what the penalty is averaged
over, or how many numbers the splice draws; the default sites; the source. ``Regularizer`` documents the options that all classes have.
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
