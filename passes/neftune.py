"""NEFTune: Jain et al., NEFTune: Noisy embeddings improve instruction finetuning, ICLR 2024, algorithm 1."""

from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Site, Splice


class NEFTune(Splice, keys=("neftune",)):
    """Adds uniform noise to the embeddings of tokens: ``z + U(-1, 1) weight / sqrt(L d)``. A ``weight`` of 5 is usual.

    z: [batch, L, d], floating -> [same shape]. ``weight`` >= 0. By default it acts on the Embedding that reads token ids: that which reads
    an input of the model, and of several the first. L counts padding, as in transformers' ``neftune_noise_alpha``.

    Attributes:
        lengths: The name of the model's input that holds the lengths: whole numbers [batch], or a bool mask [batch, L] that is True at a
            token. Then L is the number of tokens of each example.
    """

    lengths: str | None = None

    usual = "the Embedding that reads token ids"

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        reading = [site for site in sites if site.reads]
        return [site for site in reading if site.reads == reading[0].reads]

    def unfit(self, shape: Sequence[int]) -> str:
        return "" if len(shape) == 3 else "it takes the embeddings of sequences, [batch, length, features]. Leave the site out."

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise, lengths: Tensor | None) -> Tensor:
        length = z.shape[1] if lengths is None else lengths.clamp(min=1).to(weight.dtype)[:, None, None]
        magnitude = weight / (length * z.shape[2]) ** 0.5
        return z + ((2 * noise.uniform(z) - 1) * magnitude).to(z.dtype)
