"""The protocol, part 2: what each paper claims, and the comparisons that must hold for it to count as shown."""

from __future__ import annotations

from dataclasses import dataclass

from study.arms import plain

CLOSE = 1.0  # points of accuracy that "no worse" allows


@dataclass(frozen=True)
class Check:
    """A comparison, seed by seed: a measure of an arm with one of another arm, or with a number.

    ``margin`` 0: the 95 % interval of the difference lies on the side that ``better`` says. A positive margin: the arm is no worse by more.
    """

    measure: str
    better: str  # "higher" or "lower"
    than: str | float
    margin: float = 0.0
    other: str = ""  # the other arm's measure, where it is another one


@dataclass(frozen=True)
class Claim:
    """A regularizer, the arm in which it acts, what its paper claims, and the checks, all of which must hold."""

    regularizer: str
    arm: str
    source: str
    says: str
    checks: tuple[Check, ...]


def _no_worse(setup: str) -> Check:
    return Check("accuracy", "higher", plain(setup), CLOSE)


def _better(setup: str, *rivals: str, measure: str = "accuracy") -> tuple[Check, ...]:
    return tuple(Check(measure, "higher", arm) for arm in (plain(setup), *rivals))


CLAIMS = (
    Claim("BernoulliDropout", "few: dropout", "Srivastava et al. 2014",
          "Dropout lowers the test error of networks that overfit, and does so more than weight decay (table 9).",
          _better("few", "few: weight decay")),
    Claim("GaussianDropout", "few: Gaussian dropout", "Srivastava et al. 2014, section 10",
          "Multiplying by Gaussian noise works as well as dropout, or better.",
          (*_better("few"), Check("accuracy", "higher", "few: dropout", CLOSE))),
    Claim("GaussianNoise", "few: input noise", "Bishop 1995",
          "Noise on the inputs during training improves generalization.", _better("few")),
    Claim("MaxNorm", "few: max-norm", "Srivastava et al. 2014, section 5.1",
          "Max-norm together with dropout is better than dropout alone.", (Check("accuracy", "higher", "few: dropout"),)),
    Claim("DropConnect", "few: DropConnect", "Wan et al. 2013",
          "DropConnect regularizes large fully connected layers, and often outperforms dropout.", _better("few", "few: dropout")),
    Claim("ConcreteDropout", "few: concrete dropout", "Gal et al. 2017",
          "Rates that are learned do as well as rates that a grid search found.",
          (*_better("few"), Check("accuracy", "higher", "few: dropout", CLOSE))),
    Claim("L0Gates", "few: L0 gates", "Louizos et al. 2018",
          "Units are removed during training, with little loss of accuracy. Here, more than half of the units must be removed. Accuracy "
          "must fall by less than a point, and must be higher than that of a network that was trained without gates and then lost the half "
          "of its units with the smallest norms.",
          (Check("closed", "higher", 50.0), _no_worse("few"), Check("accuracy", "higher", plain("few"), other="pruned"))),
    Claim("HiddenL1", "few: hidden L1", "Glorot et al. 2011",
          "An L1 penalty on the activations of ReLUs makes them sparser; this does not hurt accuracy.",
          (Check("zeros", "higher", plain("few")), _no_worse("few"))),
    Claim("HoyerSquare", "few: Hoyer-Square", "Yang et al. 2020",
          "The penalty gives more zeros than L1 does, at the same accuracy. (In the paper, it acts on weights; here, on activations.)",
          (Check("zeros", "higher", plain("few")), Check("zeros", "higher", "few: hidden L1"), _no_worse("few"))),
    Claim("DeCov", "few: DeCov", "Cogswell et al. 2016",
          "Units become less correlated, and the gap between training and test accuracy becomes smaller.",
          (Check("correlation", "lower", plain("few")), Check("gap", "lower", plain("few")))),
    Claim("ConfidencePenalty", "few: confidence", "Pereyra et al. 2017",
          "Output distributions of higher entropy generalize better.",
          (Check("entropy", "higher", plain("few")), *_better("few"))),
    Claim("ZLoss", "few: z-loss", "Chowdhery et al. 2022",
          "The log of the softmax's normalizer stays near 0, at no cost in quality.",
          (Check("log_z", "lower", plain("few")), _no_worse("few"))),
    Claim("SpectralPenalty", "few: spectral", "Yoshida & Miyato 2017",
          "The network is less sensitive to perturbations of its input, and generalizes better than with weight decay.",
          (Check("attacked", "higher", plain("few")), Check("noisy", "higher", plain("few")), *_better("few", "few: weight decay"))),
    Claim("ChannelDropout", "maps: channel dropout", "Tompson et al. 2015",
          "In convolutional layers, dropping whole channels helps, where dropping elements helps little.",
          _better("maps", "maps: dropout")),
    Claim("DropBlock", "maps: DropBlock", "Ghiasi et al. 2018",
          "In convolutional layers, dropping blocks is better than dropping elements, and better than dropping channels.",
          _better("maps", "maps: dropout", "maps: channel dropout")),
    Claim("DropPath", "deep: drop path", "Huang et al. 2016",
          "Dropping residual branches, more often the deeper they are, lowers the test error of deep residual networks.", _better("deep")),
    Claim("LayerDrop", "deep: LayerDrop", "Fan et al. 2020",
          "A network that was trained with LayerDrop can be cut to half of its layers, without further training, with little loss.",
          (Check("pruned", "higher", plain("deep")), _no_worse("deep"), Check("pruned", "higher", plain("deep"), CLOSE, "accuracy"))),
    Claim("BernoulliDropout", "resnet: dropout, all hidden", "Srivastava et al. 2014",
          "Dropout lowers the test error of networks that overfit. Here, it acts at all hidden values of a residual network with batch "
          "norm.",
          _better("resnet")),
    Claim("BernoulliDropout", "resnet: dropout, unmarked", "Li et al. 2019, He et al. 2016 ([Where should dropout act?](where.md))",
          "Dropout at values that neither feed a batch norm nor lie on the trunk is better than dropout at all hidden values, and better "
          "than none. Here, only the classifier's input is such a value.",
          _better("resnet", "resnet: dropout, all hidden")),
    Claim("BernoulliDropout", "wide: dropout, all hidden", "Srivastava et al. 2014",
          "Dropout lowers the test error of networks that overfit. Here, it acts at all hidden values of a Wide ResNet. Half of them feed "
          "a batch norm, and none is on the trunk.", _better("wide")),
    Claim("BernoulliDropout", "wide: dropout, unmarked",
          "Zagoruyko & Komodakis 2016, Li et al. 2019 ([Where should dropout act?](where.md))",
          "Dropout between the convolutions of a branch is better than none. Here, dropout acts at the classifier's input, too, and must "
          "also be better than dropout at all hidden values.",
          _better("wide", "wide: dropout, all hidden")),
    Claim("BernoulliDropout", "wide: dropout, classifier", "Li et al. 2019",
          "Dropout after the last batch norm is better than none, and better than dropout before batch norms.",
          _better("wide", "wide: dropout, all hidden")),
    Claim("BernoulliDropout", "deep: dropout, all hidden", "Srivastava et al. 2014 ([Where should dropout act?](where.md))",
          "Where no hidden value has a mark, dropout at all of them is better than none, and no worse than at the classifier's "
          "input alone.",
          (*_better("deep"), Check("accuracy", "higher", "deep: dropout, classifier", CLOSE))),
    Claim("BernoulliDropout", "deep: dropout, classifier", "Srivastava et al. 2014",
          "Dropout lowers the test error of networks that overfit. Here, it acts at the classifier's input alone.", _better("deep")),
    Claim("AlphaDropout", "selu: alpha dropout", "Klambauer et al. 2017",
          "For SELU networks, alpha dropout improves on no dropout; standard dropout does not fit them.", _better("selu", "selu: dropout")),
    Claim("Orthogonality", "chain: orthogonality", "Bansal et al. 2018",
          "Deep networks train faster, and become more accurate.",
          (Check("early", "lower", plain("chain")), *_better("chain"))),
    Claim("Zoneout", "cells: zoneout", "Krueger et al. 2017",
          "Zoneout improves the generalization of recurrent networks.", _better("cells")),
    Claim("LockedDropout", "lstm: locked dropout", "Gal & Ghahramani 2016",
          "In recurrent networks, one mask for all steps lowers the test error, and more so than a new mask at each step.",
          _better("lstm", "lstm: dropout")),
    Claim("DropConnect", "lstm: weight drop", "Merity et al. 2018",
          "Dropping hidden-to-hidden weights prevents overfitting on the recurrent connections.", _better("lstm")),
    Claim("KLSparsity", "autoencoder: KL sparsity", "Ng 2011",
          "Each unit's mean activation comes near the target, and the code still describes the input. Here, the mean activation on test "
          "images must be within 0.02 of the target on average over the units, and the code must be as good an input for a classifier.",
          (Check("off_target", "lower", 0.02), Check("off_target", "lower", plain("autoencoder")), _no_worse("autoencoder"))),
    Claim("Contractive", "autoencoder: contractive", "Rifai et al. 2011",
          "The code is less sensitive to the input. It is a better input for a classifier than the code of an autoencoder with weight "
          "decay, or of one without any regularizer.",
          (Check("jacobian", "lower", plain("autoencoder")), *_better("autoencoder", "autoencoder: weight decay"))),
    Claim("VarianceFloor", "views: variance floor", "Bardes et al. 2022",
          "The embeddings of two views do not collapse to a point, and describe the images.",
          (Check("spread", "higher", plain("views")), *_better("views"))),
    Claim("Covariance", "views: covariance", "Bardes et al. 2022",
          "Together with the variance term, the covariance term keeps units from repeating each other, so that embeddings describe more.",
          (Check("accuracy", "higher", "views: variance floor"),)),
    Claim("L2SP", "transfer: L2-SP", "Li et al. 2018",
          "With few examples, weights that are pulled towards their initial values adapt better than weights with weight decay, or without "
          "any regularizer.",
          (*_better("transfer", "transfer: weight decay"), Check("moved", "lower", "transfer: weight decay"))),
    Claim("WeightL2", "regression: weight decay", "Krogh & Hertz 1991",
          "Weight decay improves the generalization of a linear network whose data are noisy.", _better("regression", measure="explained")),
    Claim("WeightL1", "regression: L1", "Tibshirani 1996",
          "The lasso sets some weights to 0, and predicts better than least squares.",
          (Check("removed", "higher", plain("regression")), *_better("regression", measure="explained"))),
    Claim("ElasticNet", "regression: elastic net", "Zou & Hastie 2005",
          "Correlated columns get similar weights, while the lasso picks some of them. Predictions are often better than the lasso's.",
          (Check("apart", "lower", "regression: L1"), Check("explained", "higher", "regression: L1"))),
    Claim("GroupLasso", "columns: group lasso", "Yuan & Lin 2006",
          "Whole groups vanish: more columns without information are left out than with the lasso, and predictions stay as good.",
          (Check("removed", "higher", plain("columns")), Check("removed", "higher", "columns: L1"), _no_worse("columns"))),
)  # fmt: skip

NOT_TESTED = {
    "NEFTune": "its claim is about conversations with an instruction-tuned language model",
    "EmbeddingDropout, HeadDropout": "their claims are about language models and translation; scikit-learn's wheel has no text",
    "WeightNoise": "the paper learns the variance of the noise; this class has a fixed one",
    "HiddenL2, RecurrentState": "their claims are about the perplexity of language models",
    "RecurrentNorm": "its claim is about sequences that are longer than those of training; `make demo-penalties` tests it",
}
CHANGES: tuple[str, ...] = ()  # what was changed in the protocol after results were seen, and why
