"""speechbrain: its networks on spectra, waves and words, a few narrow layers of each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.libraries.made import Entry, provider
from zoo.providers import Inputs, numbers

STEPS, BINS, WIDTH, TOKENS = 40, 20, 16, 30
ENCODER: Mapping[str, Any] = {"num_layers": 2, "d_model": WIDTH, "nhead": 2, "dropout": 0.1}


def made(place: str, **options: Any) -> nn.Module:
    """A class by module and name."""
    module, _, name = place.rpartition(".")
    network: nn.Module = getattr(importlib.import_module(f"speechbrain.lobes.models.{module}"), name)(**options)
    return network


def frames() -> Inputs:
    return (numbers(2, STEPS, BINS),)


def wide() -> Inputs:
    return (numbers(2, STEPS, WIDTH),)


def words(seed: int = 0) -> Tensor:
    return torch.randint(1, TOKENS, (2, 8), generator=torch.Generator().manual_seed(seed))


class Encoded(nn.Module):
    """An encoder with positions that are relative, which it is given, and only the encoded frames of what it returns."""

    def __init__(self, encoder: str, **options: Any) -> None:
        super().__init__()
        attention = importlib.import_module("speechbrain.nnet.attention")
        self.positions, self.encoder = attention.RelPosEncXL(WIDTH), made(encoder, **ENCODER, **options)

    def forward(self, x: Tensor) -> Tensor:
        encoded: Tensor = self.encoder(x, pos_embs=self.positions(x))[0]
        return encoded


def entries() -> dict[str, Entry]:
    shape = {"input_shape": [2, STEPS, BINS]}
    narrow: dict[str, Any] = {"channels": [8, 8, 8, 8, 24], "lin_neurons": 6, "attention_channels": 8, "res2net_scale": 2, "se_channels": 8}
    both = {
        "tgt_vocab": TOKENS,
        "input_size": BINS,
        "d_model": WIDTH,
        "nhead": 2,
        "num_encoder_layers": 2,
        "num_decoder_layers": 1,
        "d_ffn": 32,
    }
    upsampling: dict[str, Any] = {
        "in_channels": BINS,
        "out_channels": 1,
        "resblock_type": "1",
        "resblock_dilation_sizes": [[1, 3, 5]],
        "resblock_kernel_sizes": [3],
        "upsample_kernel_sizes": [4, 4],
        "upsample_initial_channel": 16,
        "upsample_factors": [2, 2],
    }
    crdnn = {"cnn_blocks": 1, "cnn_channels": [4], "rnn_layers": 1, "rnn_neurons": 8, "dnn_blocks": 1, "dnn_neurons": 8}
    return {
        "ECAPA_TDNN": Entry(lambda: made("ECAPA_TDNN.ECAPA_TDNN", input_size=BINS, **narrow), frames, "speaker"),
        "Xvector": Entry(
            lambda: made("Xvector.Xvector", in_channels=BINS, lin_neurons=6, tdnn_channels=[8, 8, 8, 8, 16]), frames, "speaker"
        ),
        "ResNet": Entry(
            lambda: made("ResNet.ResNet", input_size=BINS, channels=[8, 8, 8, 8], block_sizes=[1, 1, 1, 1], lin_neurons=6),
            frames,
            "speaker",
        ),
        "CRDNN": Entry(lambda: made("CRDNN.CRDNN", **shape, **crdnn), frames, "recognition"),
        "CRDNN on an LSTM": Entry(
            lambda: made("CRDNN.CRDNN", **shape, **crdnn, rnn_class=importlib.import_module("speechbrain.nnet.RNN").LSTM),
            frames,
            "recognition",
        ),
        "ContextNet": Entry(
            lambda: made(
                "ContextNet.ContextNet",
                **shape,
                out_channels=16,
                conv_channels=[8, 8],
                num_blocks=2,
                num_layers=1,
                strides=[1, 2],
                residuals=[True, True],
            ),
            frames,
            "recognition",
        ),
        "ConvolutionFrontEnd": Entry(
            lambda: made("convolution.ConvolutionFrontEnd", input_shape=(2, STEPS, BINS), num_layers_per_block=1, out_channels=[4, 4, 8]),
            frames,
            "recognition",
        ),
        "TransformerASR": Entry(
            lambda: made("transformer.TransformerASR.TransformerASR", **both), lambda: (*frames(), words()), "recognition"
        ),
        "TransformerASR on a Conformer": Entry(
            lambda: made(
                "transformer.TransformerASR.TransformerASR",
                **both,
                encoder_module="conformer",
                attention_type="RelPosMHAXL",
                kernel_size=5,
                normalize_before=True,
            ),
            lambda: (*frames(), words()),
            "recognition",
        ),
        "ConformerEncoder": Entry(lambda: Encoded("transformer.Conformer.ConformerEncoder", d_ffn=32, kernel_size=5), wide, "recognition"),
        "BranchformerEncoder": Entry(
            lambda: Encoded("transformer.Branchformer.BranchformerEncoder", csgu_linear_units=32, kernel_size=5), wide, "recognition"
        ),
        "TransformerLM": Entry(
            lambda: made("transformer.TransformerLM.TransformerLM", vocab=TOKENS, d_model=WIDTH, nhead=2, num_encoder_layers=2, d_ffn=32),
            lambda: (words(),),
            "language",
        ),
        "RNNLM": Entry(
            lambda: made("RNNLM.RNNLM", output_neurons=TOKENS, embedding_dim=WIDTH, rnn_layers=1, rnn_neurons=16, dnn_neurons=16),
            lambda: (words(),),
            "language",
        ),
        "MaskNet": Entry(
            lambda: made("conv_tasnet.MaskNet", N=8, B=8, H=8, P=3, X=2, R=1, C=2), lambda: (numbers(2, 8, STEPS),), "separation"
        ),
        "EnhancementGenerator": Entry(  # its layers after the first are of one size
            lambda: made("MetricGAN.EnhancementGenerator"), lambda: (numbers(2, STEPS, 257), torch.ones(2)), "enhancement"
        ),
        "HifiganGenerator": Entry(lambda: made("HifiGAN.HifiganGenerator", **upsampling), lambda: (numbers(2, BINS, 10),), "synthesis"),
        "GatedNN": Entry(lambda: made("GatedNN.GatedNN", **shape, neurons=8), frames, "perceptron"),
        "VanillaNN": Entry(lambda: made("VanillaNN.VanillaNN", **shape, dnn_neurons=8), frames, "perceptron"),
    }


PROVIDER = provider(entries)
