"""Embedding dropout: Gal & Ghahramani, A theoretically grounded application of dropout in recurrent neural networks, NIPS 2016, section
4.2; Merity, Keskar & Socher, Regularizing and optimizing LSTM language models, ICLR 2018, section 4.3."""

from collections.abc import Sequence

from torch import Tensor, nn

from graphreg import Noise, Site, Splice


class EmbeddingDropout(Splice, keys=("embedding_dropout",), on="parameters"):
    """Zeroes whole rows of an embedding's table, words, with probability ``weight``; scales the rest by ``1 / (1 - weight)``.

    w: [rows, features], floating -> [same shape]. ``weight`` is a probability, 0 <= weight < 1. By default it acts on the table of the
    Embedding that reads token ids: that which reads an input of the model, and of several the first. A word is missing wherever it occurs
    in the batch. It acts where an ``nn.Embedding`` or ``nn.EmbeddingBag`` reads the table; a layer that shares the table reads it whole.
    """

    usual = "the table of the Embedding that reads token ids"
    readers = (nn.Embedding, nn.EmbeddingBag)

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        reading = [site for site in sites if site.reads]
        return [site for site in reading if site.reads == reading[0].reads]

    def __call__(self, w: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return w * noise.keep(w, weight, shared=range(1, w.dim())) * (1 / (1 - weight)).to(w.dtype)
