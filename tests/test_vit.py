"""A ViT of any of timm's names computes what timm's own does, and its points see what the mode of attention says."""

import itertools

import pytest
import timm
import torch

from eval.attention import attention_weights
from model.architecture import architecture, of_timm, vit_options
from model.reference import MODES
from model.vit import ViT, build_vit
from runtime.config import Config, Data, Model, Views
from runtime.errors import UserError

NAMES = (  # each has something that those before it have not
    "vit_tiny_patch16_224", "vit_small_patch8_224", "vit_large_patch32_224", "vit_base_patch16_224_miil",
    "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2",
    "vit_giant_patch14_reg4_dinov2", "vit_base_patch14_reg1_tipsv2", "deit3_small_patch16_224",
    "vit_base_patch16_clip_224", "vit_base_patch32_clip_quickgelu_224", "vit_gigantic_patch14_224", "beit3_base_patch16_224",
)  # fmt: skip


def small(name: str, **options):
    """(timm's model of two blocks in float64, its patch) with random tensors, so that nothing is 0 or nearly so."""
    torch.manual_seed(0)
    patch = of_timm(name)[0].patch
    size = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 4 * patch} | options
    theirs = timm.create_model(name, num_classes=0, global_pool="token", **size).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return theirs, patch


@pytest.mark.parametrize("name", NAMES)
def test_equals_timm(name: str):
    """Tokens of timm's own pass. The ViT is once built from the config, once from the tensors alone."""
    theirs, patch = small(name)
    model = Model(arch=name, width=48, depth=2, heads=3)
    from_config = build_vit(Config(model=model, data=Data(views=[Views(2, 4 * patch, teacher=True)])), 0.0)
    about = architecture(model).not_in_tensors()
    from_tensors = ViT(**vit_options(theirs.state_dict(), about))
    assert from_tensors.about() == from_config.about()
    images = torch.randn(2, 3, 4 * patch, 4 * patch, dtype=torch.float64)
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        for ours in (from_config, from_tensors):
            ours.double().eval().load_state_dict(theirs.state_dict())
            out = ours(images, torch.rand(2, 5, 2))  # no token sees the points
            assert (out.cls - tokens[:, 0]).abs().max() < 1e-10
            assert (out.patches - tokens[:, theirs.num_prefix_tokens :]).abs().max() < 1e-10


def with_registers(mode: str, **options) -> ViT:
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "image_size": 32}
    vit = ViT(**sizes, registers=3, class_position=False, layer_scale=True, attention=mode, **options).double().eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit


@pytest.mark.parametrize("form", ["fused", "unfused"])
@pytest.mark.parametrize("mode", MODES)
def test_points_do_not_attend_to_registers(mode: str, form: str, monkeypatch):
    """In one block, a register reaches the points in mode none only."""
    monkeypatch.setattr("model.reference._use_unfused", lambda q: form == "unfused")
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 1, "heads": 2, "patch": 8, "image_size": 32, "registers": 3}
    vit = ViT(**sizes, attention=mode, locality=1.0 if mode.startswith("patches") else None).double().eval()
    images, points = torch.randn(2, 3, 32, 32).double(), torch.rand(2, 5, 2)
    out = vit(images, points)
    gradients = [
        torch.autograd.grad(t.sum(dim=(0, 1))[0], vit.reg_token, retain_graph=True, allow_unused=True)[0]
        for t in (out.references, out.patches, out.cls[:, None])
    ]
    reached = [g is not None and bool(g.any()) for g in gradients]
    assert reached == [mode == "none", True, True]


@pytest.mark.parametrize("mode", MODES)
def test_last_block_without_patches(mode: str):
    vit, images, points = with_registers(mode), torch.randn(2, 3, 32, 32).double(), torch.rand(2, 5, 2)
    with torch.no_grad():
        whole, part = vit(images, points), vit(images, points, want=("cls",))
    assert part.patches is None
    assert (whole.cls - part.cls).abs().max() < 1e-12
    assert (whole.references - part.references).abs().max() < 1e-12


@pytest.mark.parametrize("mode", ["patches+self", "patches+cls"])
def test_attention_of_cls_and_points(mode: str):
    """The weights that are shown are those that [CLS] had; a row of a point holds no weight of registers."""
    vit, images, points = with_registers(mode, qk_norm=True), torch.randn(2, 3, 32, 32).double(), torch.rand(2, 5, 2)
    with torch.no_grad():
        shown, of_points = attention_weights(vit, images, points)
        attention = vit(images, points, want=("cls", "attention")).attention
    assert (shown - attention).abs().max() < 1e-5
    assert attention.shape == (2, 2, 16)
    assert (attention.sum(-1) < 1).all()
    assert (of_points.sum(-1) < 1).all()  # the rest is on itself, or on [CLS]


def test_positions_are_read_from_the_grid():
    """A reference token of the center of a patch is that patch's position, whatever is in front of the grid."""
    for class_position, registers in itertools.product((False, True), (0, 2)):
        vit = ViT(
            width=32, depth=0, heads=2, patch=8, image_size=32, class_position=class_position, registers=registers
        )
        vit.norm = torch.nn.Identity()
        center = torch.tensor([[[2.5 / 4, 1.5 / 4]]])
        token = vit(torch.zeros(1, 3, 32, 32), center).references[0, 0]
        assert torch.allclose(token, vit.pos_embed[0, vit.front_positions + 4 * 1 + 2], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_small_patch16_dinov3", "rotary"),
        ("eva02_tiny_patch14_224", "rotary"),
        ("vit_base_patch16_siglip_224", "it has no .CLS."),
        ("vit_base_patch16_xp_224", "its blocks are ParallelScalingBlock"),
        ("vit_base_patch16_rpn_224", "its tokens have no last LayerNorm|its blocks are ResPostBlock|it has no .CLS."),
        ("vit_small_patch16_18x2_224", "its blocks are ParallelThingsBlock"),
        ("beit_base_patch16_224", "it is a Beit"),
        ("vit_small_patch14_dinov3", "timm has no model .*, did you mean 'vit_small_patch16_dinov3'"),
    ],
)
def test_what_cannot_be_trained(name: str, message: str):
    with pytest.raises(UserError, match=f"model.arch: .*{message}"):
        architecture(Model(arch=name))


def test_small_grids_need_what_the_file_says():
    """With 4 registers, 9 positions are 3 x 3 patches, or those of [CLS], the registers and 2 x 2 patches."""
    for class_position, side in ((True, 2), (False, 3)):
        vit = ViT(width=32, depth=1, heads=2, patch=8, image_size=8 * side, registers=4, class_position=class_position)
        again = vit_options(vit.state_dict(), vit.about())
        assert (again["image_size"], again["class_position"]) == (8 * side, class_position)
