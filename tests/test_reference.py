"""Reference attention equals the published N x N mask; [CLS] and patches do not depend on reference tokens."""

from math import exp

import pytest
import torch
from torch import Tensor

from eval.attention import attention_weights
from model.reference import MODES, attend, attention, locality_bias, point_embedding
from model.vit import ViT
from runtime.config import LOCALITY, load_config
from runtime.errors import UserError


def dense_mask(patches: int, references: int, mode: str) -> Tensor:
    """True where a query (row) may attend to a key (column); order [CLS], patches, references. Published code, VT:342."""
    image = 1 + patches
    length = image + references
    allowed = torch.ones(length, length, dtype=torch.bool)
    if mode == "none":
        return allowed
    allowed[:, image:] = False
    if mode == "patches":
        allowed[image:, 0] = False
    if mode == "patches+self":
        allowed[image:, 0] = False
        allowed.fill_diagonal_(True)
    if mode == "all_query":
        allowed[:, 0] = False
        allowed.fill_diagonal_(True)
    return allowed


@pytest.mark.parametrize(
    ("mode", "locality"), [*((m, None) for m in MODES), *((m, 0.7) for m in MODES if m.startswith("patches"))]
)
@pytest.mark.parametrize("references", [0, 1, 7])
@pytest.mark.parametrize("form", ["fused", "unfused"])
def test_attend_equals_masked_attention(mode: str, references: int, form: str, locality: float | None, monkeypatch):
    # the unfused form is otherwise used in bfloat16 only, which is too coarse for this comparison
    monkeypatch.setattr("model.reference._use_unfused", lambda q: form == "unfused")
    torch.manual_seed(0)
    patches = 9
    q, k, v = torch.randn(3, 4, 3, 1 + patches + references, 8, dtype=torch.float64).requires_grad_().unbind(0)
    image = tuple(t[:, :, : 1 + patches] for t in (q, k, v))
    # two groups of images; the last image has no reference tokens
    groups = [tuple(t[group, :, 1 + patches :] for t in (q, k, v)) for group in (slice(0, 2), slice(2, 3))]
    groups = groups if references else []
    bias, biases = torch.zeros(3, references, patches, dtype=torch.float64), None
    if locality and references:
        points = torch.rand(3, references, 2)
        bias = locality_bias(points, 3, 3, locality)[:, 0]
        biases = [locality_bias(points[:2], 3, 3, locality), locality_bias(points[2:], 3, 3, locality)]
    outputs = attend(image, groups, mode, biases)
    n_image = len(outputs) - len(groups)
    of_images, of_references = torch.cat(outputs[:n_image]), outputs[n_image:]
    scores = q @ k.transpose(-2, -1) / 8**0.5
    prior = torch.zeros(4, 1, *scores.shape[-2:], dtype=torch.float64)
    prior[:3, 0, 1 + patches :, 1 : 1 + patches] = bias
    scores = (scores + prior).masked_fill(~dense_mask(patches, references, mode), -torch.inf)
    expected = scores.softmax(-1) @ v
    n = 3 if mode == "none" else 4  # in mode none the masked form would give the last image reference tokens
    pairs = [(of_images[:n], expected[:n, :, : 1 + patches])]
    if references:
        pairs.append((torch.cat(of_references), expected[:3, :, 1 + patches :]))
    assert all((a - b).abs().max() < 1e-12 for a, b in pairs)
    probes = [torch.randn_like(a) for a, _ in pairs]
    for x in (q, k, v):
        a, b = (torch.autograd.grad(side, x, probes, retain_graph=True)[0] for side in zip(*pairs, strict=True))
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_last_block_without_patches(mode: str, drop_path: float):
    """want=("cls",): the same [CLS] and reference tokens, and the same gradients, for two groups of images."""
    network = vit(mode, drop_path=drop_path).double().train()
    images, points = torch.randn(3, 3, 32, 32).double(), [torch.rand(2, 4, 2).double(), torch.rand(1, 2, 2).double()]
    results = []
    for want in (("cls", "patches"), ("cls",)):
        torch.manual_seed(1)
        cls, patches, (a, b), _ = network(images, points, want)
        assert (patches is None) == ("patches" not in want)
        loss = cls.square().mean() + a[..., :5].square().mean() + b.sin().mean()
        results.append((cls, a, b, *torch.autograd.grad(loss, list(network.parameters()))))
    assert all((x - y).abs().max() < 1e-12 for x, y in zip(*results, strict=True))
    if mode != "none":  # a group by itself gives the same
        single = network.eval()(images[:2], points[0]).references
        assert (single - network(images, points).references[0]).abs().max() < 1e-12


def test_unfused_attention_equals_fused():
    """On a CPU bfloat16 uses the unfused form of attention, every other dtype torch's fused one."""
    q, k, v = torch.randn(3, 2, 3, 11, 8).unbind(0)
    unfused = attention(*(t.bfloat16() for t in (q, k, v)))
    assert unfused.dtype == torch.bfloat16
    assert (unfused.float() - attention(q, k, v)).abs().max() < 3e-2


def test_masks_of_the_published_code(oracle):
    """The masks above are the published ones (their token order: [CLS], references, patches)."""
    names = {
        "020": "none",
        "all2pos": "patches+cls",
        "all2pos_pos2cls": "patches",
        "all2pos_pos2cls_eye": "patches+self",
    }
    names["all_query"] = "all_query"
    order = torch.cat([torch.tensor([0]), torch.arange(9, 25), torch.arange(1, 9)])
    for name, theirs in oracle("a_masks_allowed").items():
        mode = names[name.split(".")[-1]]
        assert torch.equal(theirs[order][:, order].bool(), dense_mask(16, 8, mode)), name


def vit(mode: str, **options) -> ViT:
    torch.manual_seed(0)
    return ViT(width=32, depth=2, heads=2, patch=8, image_size=32, attention=mode, **options).eval()


@pytest.mark.parametrize("mode", [m for m in MODES if m != "none"])
def test_cls_and_patches_do_not_depend_on_reference_tokens(mode: str):
    network, images = vit(mode), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        cls, patches, no_references, _ = network(images)
        cls_with, patches_with, references, _ = network(images, torch.rand(3, 5, 2))
        one = network(images, torch.rand(3, 1, 2).clone()).references
    assert no_references is None
    assert one.shape == (3, 1, 32)
    assert references.shape == (3, 5, 32)
    assert (cls - cls_with).abs().max() < 1e-5
    assert (patches - patches_with).abs().max() < 1e-5


@pytest.mark.parametrize("mode", [m for m in MODES if m != "none"])
def test_reference_tokens_do_not_depend_on_each_other(mode: str):
    network, images, points = vit(mode), torch.randn(2, 3, 32, 32), torch.rand(2, 6, 2)
    with torch.no_grad():
        together = network(images, points).references
        separate = torch.cat([network(images, points[:, i : i + 1]).references for i in range(6)], 1)
    assert (together - separate).abs().max() < 1e-5


def test_locality_is_a_gaussian_around_the_point():
    """sigma counts patches of the view, whatever its size and sides; weights exp(-d^2 / (2 sigma^2))."""
    point = torch.tensor([[[2.5 / 6, 1.5 / 4]]])  # the center of column 2, row 1 of 4 x 6 patches
    weights = locality_bias(point, 4, 6, sigma=0.8).exp().view(4, 6)
    for y in range(4):
        for x in range(6):
            assert weights[y, x] == pytest.approx(exp(-((x - 2) ** 2 + (y - 1) ** 2) / (2 * 0.8**2)), rel=1e-5)


def test_locality_reaches_reference_tokens_only():
    """And a narrow one makes the token read what lies under its point: only changes near it reach the token."""
    images, points = torch.randn(2, 3, 32, 32), torch.full((2, 1, 2), 3.5 / 4)  # the center of the last patch
    with torch.no_grad():
        published, local, wide = (vit("patches+self", locality=s)(images, points) for s in (None, 0.2, 1e6))
        images[:, :, :16] += 1  # the upper half, three patches away
        moved = [vit("patches+self", locality=s)(images, points).references for s in (None, 0.2)]
    assert torch.equal(published.cls, local.cls)
    assert torch.equal(published.patches, local.patches)
    assert (published.references - wide.references).abs().max() < 1e-5
    changes = [(a - b.references).norm() for a, b in zip(moved, (published, local), strict=True)]
    assert changes[1] < 0.2 * changes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [m for m in MODES if m.startswith("patches")])
def test_every_allowed_width_gives_numbers(mode, dtype):
    """At corners, between patches and at their centers. The probes need weight on some patch too."""
    images = torch.randn(1, 3, 32, 32, dtype=dtype)
    points = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [0.375, 0.375]]])
    with torch.no_grad():
        published = vit(mode).to(dtype)(images, points).references
        for sigma in LOCALITY:
            network = vit(mode, locality=sigma).to(dtype)
            assert network(images, points).references.isfinite().all()
            assert (attention_weights(network, images, points)[1].sum(-1) > 0).all()
        assert (network(images, points).references - published).abs().max() < 1e-5  # the widest is no prior
    for sigma in ("0.09", "1e5", "1e200"):
        with pytest.raises(UserError, match=r"reference\.locality: expected a number from 0.1 to 10000"):
            load_config("configs/demo.yaml", [f"reference.locality={sigma}"])


def test_embedding_at_a_patch_center_is_the_patch_position():
    grid = torch.randn(4, 6, 5)
    x, y = torch.meshgrid((torch.arange(6) + 0.5) / 6, (torch.arange(4) + 0.5) / 4, indexing="xy")
    points = torch.stack([x, y], -1).flatten(0, 1)[None]
    for border in ("zeros", "border"):
        assert (point_embedding(grid, points, border)[0] - grid.flatten(0, 1)).abs().max() < 1e-6


@pytest.mark.parametrize("border", ["zeros", "border"])
def test_point_embedding_equals_grid_sample(border: str):
    torch.manual_seed(1)
    grid, points = torch.randn(5, 7, 3, dtype=torch.float64), torch.rand(2, 50, 2, dtype=torch.float64) * 1.2 - 0.1
    at = (points * 2 - 1).flatten(0, 1)[None, :, None]
    theirs = torch.nn.functional.grid_sample(
        grid.permute(2, 0, 1)[None], at, mode="bicubic", padding_mode=border, align_corners=False
    )
    assert (point_embedding(grid, points, border).flatten(0, 1) - theirs[0, :, :, 0].T).abs().max() < 1e-12


def test_a_plain_timm_vit_loads_the_weights():
    import timm

    network = vit("patches+self")
    plain = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True
    ).eval()
    plain.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = plain.forward_features(images)
        cls, patches = network(images)[:2]
    assert (features[:, 0] - cls).abs().max() < 1e-5
    assert (features[:, 1:] - patches).abs().max() < 1e-5
