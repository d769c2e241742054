"""vit_pytorch: of each of its modules the model, which is the last class in it that can be made with ``num_classes``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import partial
from typing import Any

import vit_pytorch
from torch import nn

from zoo.libraries.made import Entry, known, provider
from zoo.providers import Inputs, clips, images, numbers

SIZE, FRAMES = 32, 4
SMALL: Mapping[str, Any] = {
    "image_size": SIZE, "patch_size": 8, "image_patch_size": 8, "frames": FRAMES, "frame_patch_size": 2, "seq_len": SIZE, "num_classes": 5,
    "dim": 16, "depth": 2, "spatial_depth": 1, "temporal_depth": 1, "cls_depth": 1, "heads": 2, "dim_head": 8, "mlp_dim": 32,
    "mlp_mult": 2, "freq_patch_size": 8, "num_residual_streams": 2, "num_slots": 4,
}  # fmt: skip

OWN: Mapping[str, Mapping[str, Any]] = {  # what the table does not fit
    "ats_vit": {"max_tokens_per_depth": (8, 4)},
    "cross_vit": {"sm_dim": 16, "lg_dim": 24, "sm_patch_size": 8, "lg_patch_size": 16, "depth": 1},
    "crossformer": {"dim": (32, 32, 32, 32), "depth": (1, 1, 1, 1), "global_window_size": (4, 2, 1, 1), "local_window_size": 2},
    "cvt": {"s1_emb_dim": 8, "s2_emb_dim": 16, "s2_depth": 1, "s3_emb_dim": 24, "s3_depth": 2},
    "levit": {"image_size": 64, "dim": (16, 24, 32), "depth": 1, "heads": (2, 2, 2)},
    "look_vit": {"depth": 1, "patch_size": 8, "highres_patch_size": 4},
    "looped_vit": {"pre_loop_depth": 1, "num_looped_blocks": 1, "post_loop_depth": 1, "loop_depth": 2},
    "max_vit": {"depth": (1, 1), "window_size": 2},
    "max_vit_with_registers": {"depth": (1, 1), "window_size": 2},
    "mobile_vit": {"patch_size": (2, 2), "image_size": (64, 64), "dims": [16, 16, 24], "channels": [8] * 10 + [16], "depths": (1, 1, 1)},
    "local_vit": {"image_size": 128},
    "na_vit": {"token_dropout_prob": 0.1},
    "na_vit_nested_tensor": {"token_dropout_prob": 0.1},
    "na_vit_nested_tensor_3d": {"token_dropout_prob": 0.1, "max_frames": FRAMES},
    "nest": {"patch_size": 4, "num_hierarchies": 2, "block_repeats": (1, 1)},
    "pit": {"depth": (1, 1)},
    "regionvit": {"dim": (8, 8, 16, 16), "depth": (1, 1, 1, 1), "window_size": 2},
    "scalable_vit": {"depth": (1, 1), "heads": (1, 2), "reduction_factor": (2, 1), "window_size": (4, None)},
    "sep_vit": {"depth": (1, 1), "heads": (1, 2)},
    "t2t": {"t2t_layers": ((3, 2), (3, 2))},
    "twins_svt": {
        **{f"s{stage}_emb_dim": 8 for stage in (1, 2, 3, 4)}, **{f"s{stage}_local_patch_size": 1 for stage in (1, 2, 3, 4)},
        **{f"s{stage}_global_k": 1 for stage in (1, 2, 3, 4)}, "s3_depth": 1, "s4_depth": 1,
    },
    "vivit": {"use_flash_attn": False},
    "vit_with_patch_merger": {"patch_merge_layer": 1, "patch_merge_num_tokens": 4},
}  # fmt: skip

PICTURES: Mapping[str, int] = {  # those whose windows do not fit 32 pixels
    "crossformer": 64, "levit": 64, "local_vit": 128, "mobile_vit": 64, "regionvit": 64, "sep_vit": 56, "twins_svt": 64,
}  # fmt: skip

LEFT: Mapping[str, str] = {
    "efficient, vit_nd_masking": "`efficient` is a wrapper around a transformer that the user passes in; `vit_nd_masking` is a function",
    "accept_video_wrapper, dino, distill, es_vit, extractor, lejepa, levjepa, levjepa_nd, mpp, recorder, vat": "they train or "
    "inspect a network that the user passes in, which is what one would regularize",
    "vit_nd, vit_nd_pope, vit_nd_rotary": "their attention (FlexAttention) has no backward on a CPU",
    "vaat": "it reads sound with torchaudio",
}


def modules() -> list[str]:
    outside = {name for names in LEFT for name in names.split(", ")}
    return sorted(each.name for each in pkgutil.iter_modules(vit_pytorch.__path__) if each.name not in outside)


def model_class(module: str) -> type[nn.Module]:
    place = importlib.import_module(f"vit_pytorch.{module}")
    own = [kind for kind in vars(place).values() if inspect.isclass(kind) and kind.__module__ == place.__name__]
    return [kind for kind in own if issubclass(kind, nn.Module) and "num_classes" in inspect.signature(kind).parameters][-1]


def _made(module: str) -> nn.Module:
    kind = model_class(module)
    return kind(**{**known(kind, SMALL), **OWN.get(module, {})})


def _inputs(module: str) -> Inputs:
    accepted = inspect.signature(model_class(module)).parameters
    if "seq_len" in accepted:
        return (numbers(2, 3, SIZE),)
    if "frames" in accepted:
        return clips(FRAMES, SIZE)
    return images(PICTURES.get(module, SIZE))


def _compact(module: str, **options: Any) -> nn.Module:
    """The compact ones pass most of their sizes on by keyword."""
    kind = importlib.import_module(f"vit_pytorch.{module}").CCT
    sizes = {"img_size": SIZE, "embedding_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5}
    return kind(**sizes, positional_embedding="learnable", **options)


def _masked(kind: str, **options: Any) -> nn.Module:
    made = getattr(importlib.import_module(f"vit_pytorch.{kind.lower()}"), kind)
    return made(encoder=_made("deepvit"), **options)  # vit.ViT has no position for the class token any more, which both pass over


def _nested() -> Inputs:
    return ([numbers(3, SIZE, SIZE), numbers(3, 16, SIZE, seed=1)],)


def entries() -> dict[str, Entry]:
    special = {
        "cct": Entry(partial(_compact, "cct"), partial(images, SIZE)),
        "cct_3d": Entry(partial(_compact, "cct_3d", num_frames=FRAMES), partial(clips, FRAMES, SIZE)),
        "learnable_memory_vit": Entry(_remembering, partial(images, SIZE)),
        "mae": Entry(partial(_masked, "MAE", decoder_dim=16, decoder_heads=2, decoder_dim_head=8), partial(images, SIZE)),
        "simmim": Entry(partial(_masked, "SimMIM"), partial(images, SIZE)),
        "mp3": Entry(_shuffled, partial(images, SIZE)),
        "na_vit": Entry(partial(_made, "na_vit"), lambda: ([_nested()[0]],)),
        "na_vit_nested_tensor": Entry(partial(_made, "na_vit_nested_tensor"), _nested),
        "na_vit_nested_tensor_3d": Entry(
            partial(_made, "na_vit_nested_tensor_3d"), lambda: ([numbers(3, FRAMES, SIZE, SIZE), numbers(3, FRAMES, 16, SIZE, seed=1)],)
        ),
        "vat_siglip": Entry(_acting, lambda: (numbers(2, 1, 3, SIZE, SIZE),)),
    }
    return {name: special.get(name) or Entry(partial(_made, name), partial(_inputs, name)) for name in modules()}


def _remembering() -> nn.Module:
    place = importlib.import_module("vit_pytorch.learnable_memory_vit")
    return place.Adapter(vit=place.ViT(**known(place.ViT, SMALL)), num_classes=3, num_memories_per_layer=2)


def _shuffled() -> nn.Module:
    place = importlib.import_module("vit_pytorch.mp3")
    return place.MP3(vit=place.ViT(**known(place.ViT, SMALL)), masking_ratio=0.5)


def _acting() -> nn.Module:
    kind: Any = importlib.import_module("vit_pytorch.vat_siglip").SigLIPVAT
    seen = {"siglip_image_size": SIZE, "siglip_patch_size": 8, "siglip_dim": 16, "siglip_depth": 2, "siglip_heads": 2, "siglip_mlp_dim": 32}
    return kind(dim=16, depth=2, heads=2, dim_head=8, dim_action=4, mlp_dim=32, action_chunk_len=3, **seen)


PROVIDER = provider(entries, LEFT)
