"""Embedding dropout, which drops whole words."""

from collections.abc import Sequence

from torch import Tensor, nn

from graphreg import Noise, Site, Splice


class EmbeddingDropout(Splice, keys=("embedding_dropout",), on="parameters"):
    """Zeroes whole rows of an embedding table at random, so that the word of such a row is missing everywhere. The other rows are scaled.

    Formula: ``w m / (1 - weight)``, where m is 0 with probability ``weight``, else 1. Only an ``nn.Embedding`` or ``nn.EmbeddingBag`` reads
    the result. Any other layer that shares the table, such as a tied output layer, reads the unchanged table.
    Shapes: w [rows, features], floating -> [same shape].

    Args:
        weight: The probability that a row is zeroed, 0 <= weight < 1.

    Draws: one m for each row in each call. The whole batch shares the draw.
    Default sites: the first table that an input of the model indexes, in the order of ``named_parameters()``, and all other tables that the
    same input indexes.
    Source: Gal & Ghahramani, A theoretically grounded application of dropout in recurrent neural networks, NIPS 2016, section 4.2; Merity,
    Keskar & Socher, Regularizing and optimizing LSTM language models, ICLR 2018, section 4.3.
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
