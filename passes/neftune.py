"""NEFTune: noise on the embeddings of tokens."""

from collections.abc import Sequence

from torch import Tensor

from graphreg import ModelInput, Noise, Site, Splice


class NEFTune(Splice, keys=("neftune",)):
    """Adds uniform noise to the embeddings of tokens.

    Formula: ``z + u weight / sqrt(L d)``, where u is uniform in [-1, 1). Without ``lengths``, L counts padding, as in transformers'
    ``neftune_noise_alpha``.
    Shapes: z [batch, L, d], floating -> [same shape].

    Args:
        weight: The scale of the noise, 0 or more; 5 is usual.
        lengths: The name of an input of the model. The input has the lengths of the sequences, whole numbers [batch], or is a mask
            [batch, L] that is 1 or True at tokens, and 0 or False at padding. In the formula, L is then the number of tokens of each
            example.

    Draws: one u for each element.
    Default sites: the output of the first embedding that reads an input of the model, and of all embeddings that read the same input.
    Embeddings of one index an example, such as a user, are left out.
    Source: Jain et al., NEFTune: Noisy embeddings improve instruction finetuning, ICLR 2024, algorithm 1.
    """

    lengths: ModelInput = None

    usual = "the Embedding that reads token ids"
    separable = "examples"

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        reading = [site for site in sites if site.reads]
        # an embedding of one index an example, such as a user, is no sequence
        reading = [site for site in reading if site.shape is None or not self.unfit(site.shape)] or reading
        return [site for site in reading if site.reads == reading[0].reads]

    def unfit(self, shape: Sequence[int]) -> str:
        return "" if len(shape) == 3 else "the splice takes the embeddings of sequences, [batch, length, features]. Leave the site out."

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise, lengths: Tensor | None) -> Tensor:
        # An example without tokens would get infinite noise.
        length = z.shape[1] if lengths is None else lengths.clamp(min=1).to(weight.dtype)[:, None, None]
        magnitude = weight / (length * z.shape[2]) ** 0.5
        return z + ((2 * noise.uniform(z) - 1) * magnitude).to(z.dtype)
