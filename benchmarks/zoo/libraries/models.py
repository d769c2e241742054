"""Where the models of other libraries come from: ``python -m zoo --models zoo.libraries.models`` runs them."""

from __future__ import annotations

from collections.abc import Mapping

PROVIDERS: Mapping[str, str] = {
    "vit_pytorch": "zoo.libraries.of_vit_pytorch:PROVIDER",
    "x_transformers": "zoo.libraries.of_x_transformers:PROVIDER",
    "monai": "zoo.libraries.of_monai:PROVIDER",
    "rtdl": "zoo.libraries.of_tables:PROVIDER",
    "pyg": "zoo.libraries.of_geometric:PROVIDER",
    "smp": "zoo.libraries.of_smp:PROVIDER",
    "pytorchcv": "zoo.libraries.of_pytorchcv:PROVIDER",
    "diffusers": "zoo.libraries.of_diffusers:PROVIDER",
    "stable_baselines3": "zoo.libraries.of_policies:PROVIDER",
    "open_clip": "zoo.libraries.of_open_clip:PROVIDER",
}
