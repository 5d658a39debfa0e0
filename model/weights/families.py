"""Whose weights a file holds, by the names of its tensors. A family is what messages call them, and what the shapes do not
tell: which of several networks is meant, and how many heads it has."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from model.architecture import ROTARY
from runtime.pixels import Pixels


@dataclass(frozen=True)
class Family:
    """A file is of the first family of FAMILIES each of whose marks is in one of its tensors' names."""

    name: str
    marks: tuple[str, ...] = ()  # patterns; each begins where a part of a name does
    encoder: str = ""  # prefix of the network that is evaluated, where several are side by side: the published choice
    heads: int | None = None  # where they are not of 64 dimensions
    pixels: Pixels | None = None  # where they are not ImageNet's
    refusal: str = ""  # why none of its networks can be loaded


CLIP = Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# from the most special to the most general
FAMILIES = (
    Family("DINOv3", (r"rope_embed\.|storage_tokens",), refusal=ROTARY),
    Family("DINOv3 of Hugging Face", (r"layer\.\d+\.attention\.q_proj\.",), refusal=ROTARY),
    Family("EVA", (r"rope\.|(rope|attn)\.freqs_cos",), refusal=ROTARY),
    Family("BEiT", (r"rel_pos_bias\.|relative_position_bias",), refusal="its positions are relative: there is no grid"),
    Family("a Swin Transformer", (r"layers\.\d+\.blocks\.",), refusal="only ViTs and ResNets can be loaded"),
    Family("a ConvNeXt", (r"stages\.\d+\.",), refusal="only ViTs and ResNets can be loaded"),
    Family("a ViT of torchvision", (r"conv_proj\.weight",)),
    Family("a distilled DeiT", (r"dist_token|embeddings\.distillation_token",), refusal="it has two class tokens"),
    Family("MAE of Hugging Face", (r"decoder\.decoder_",)),
    Family("MAE", (r"decoder_(embed|pos_embed|blocks)\b",)),
    Family("MSN", (r"fc\.fc1\.weight",)),
    Family("MoCo-v3", (r"base_encoder\.",), encoder="base_encoder.", heads=12),  # 12 for every width
    Family("DenseCL", (r"encoder_q\.0\.",), encoder="encoder_q.0."),
    Family("MoCo", (r"encoder_q\.",), encoder="encoder_q."),
    Family("lightly-train", (r"(\w+_)?embedding_model\.|wrapped_model\.",)),
    Family("lightly", (r"(student|teacher)_backbone\.|backbone_momentum\.",)),
    Family("solo-learn", (r"momentum_(backbone|projector)\.",)),
    Family("solo-learn", (r"projector\.", r"classifier\.")),
    Family("iBOT", (r"masked_embed|head\.(last_layer2|mlp2)\.",)),
    Family("DINOv2 with registers of Hugging Face", (r"embeddings\.register_tokens",)),
    Family("DINOv2 of Hugging Face", (r"embeddings\.", r"layer_scale1\.lambda1")),
    Family("a ViT of Hugging Face", (r"embeddings\.patch_embeddings\.projection\.",)),
    Family("DINOv2 with registers", (r"register_tokens",)),
    Family("DINOv2", (r"mask_token|dino_head\.", r"ls1\.gamma")),
    Family(
        "Leopart", (r"projection_head\.2\.weight", r"prototypes")
    ),  # its head has linear maps 0, 2 and 4; SwAV's 0 and 3
    Family("SwAV", (r"prototypes\b",)),
    Family("DenseDINO", (r"ref_head\.",)),
    Family("DINO", (r"head\.last_layer\.",)),
    Family("CLIP", (r"norm_pre\.weight",), pixels=CLIP),
)
UNKNOWN = Family("")


def recognize(names: Iterable[str]) -> Family:
    """The family of a file whose tensors have these names; UNKNOWN if nothing tells, as with a plain file of timm."""
    text = "\n".join(names)
    for family in FAMILIES:
        if all(re.search(rf"(?:^|\.)(?:{mark})", text, re.MULTILINE) for mark in family.marks):
            return family
    return UNKNOWN
