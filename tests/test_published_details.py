"""Details of the published network, each held by numbers worked out by hand. Needs no file of ../shared.

Sources: DINO, Caron et al. 2021, and its code (github.com/facebookresearch/dino); DenseDINO, paper section 3.2, and its code
(github.com/yyk-wew/DenseDINO), which keeps DINO's network. tests/test_oracle.py holds the whole step beside their tensors.
"""

from math import erf, sqrt

import numpy as np
import pytest
import torch
from torch import nn

from model.heads import ProjectionHead
from model.methods import build
from model.reference import point_embedding, resize_grid
from model.vit import ViT
from pipeline.batch import Batch, draw
from runtime.config import Config, Head, Model, Views
from runtime.schedule import StepValues

# ------------------------------------------------------------------------------------------------------ the position grid


def test_a_resized_grid_is_read_at_the_published_scale():
    """DINO, VisionTransformer.interpolate_pos_encoding: the scale is (patches + 0.1) / side of the grid, not
    patches / side, and F.interpolate samples at that scale.

    For 3 x 6 patches of a grid of 31 x 61 both scales are 1 / 10, so patch i reads at 10 * (i + 1/2) - 1/2: at 4.5, 14.5,
    and so on. There, half way between two cells, the bicubic reading of a ramp is the ramp. At 3 / 31 it would be 4.67.
    """
    y, x = torch.meshgrid(torch.arange(31.0), torch.arange(61.0), indexing="ij")
    resized = resize_grid(torch.stack([y, x], -1).double(), 3, 6)
    at_y, at_x = torch.meshgrid(10 * torch.arange(3.0) + 4.5, 10 * torch.arange(6.0) + 4.5, indexing="ij")
    torch.testing.assert_close(resized, torch.stack([at_y, at_x], -1).double(), rtol=0, atol=1e-6)


def test_a_point_reads_the_position_grid_and_teaches_it():
    """DenseDINO, VisionTransformer.interpolate_ref_pos: without --detach_pos_embed the reference loss reaches the position
    embedding. Half way between two columns the bicubic weights (a = -3/4) are -3/32, 19/32, 19/32, -3/32."""
    grid = torch.randn(5, 6, 1, dtype=torch.float64, requires_grad=True)
    point = torch.tensor([[[3 / 6, 2.5 / 5]]], dtype=torch.float64)  # row 2, between columns 2 and 3
    (gradient,) = torch.autograd.grad(point_embedding(grid, point).sum(), grid)
    want = torch.zeros(5, 6, dtype=torch.float64)
    want[2, 1:5] = torch.tensor([-3, 19, 19, -3]) / 32
    torch.testing.assert_close(gradient[..., 0], want)


def test_a_reference_token_teaches_the_position_embedding():
    """The same through the network. Without blocks a reference token is its point's embedding, normed, so the gradient
    reaches one row of pos_embed: that of the patch in whose center the point lies, here row 1, column 2 of 4 x 4."""
    torch.manual_seed(0)
    network = ViT(width=8, depth=0, heads=2, patch=8, image_size=32)
    reference = network(torch.randn(1, 3, 32, 32), torch.tensor([[[2.5 / 4, 1.5 / 4]]]))[2]
    reference[..., 0].sum().backward()
    assert network.pos_embed.grad is not None
    reached = network.pos_embed.grad[0].norm(dim=1) > 1e-6
    assert reached.nonzero().flatten().tolist() == [1 + 1 * 4 + 2]


# ---------------------------------------------------------------------------------------------------- heads and drop path


def test_the_heads_have_the_exact_gelu():
    """DINO, DINOHead: nn.GELU(), which is x * Phi(x); its tanh form differs by 1.5e-4 at x = 1. A head of one hidden unit,
    all of whose weights are 1, with outputs gelu(gelu(1)) and 1 before they are normalized."""
    head = ProjectionHead(1, hidden=1, bottleneck=2, prototypes=1).double()
    first, second, last = (m for m in head.modules() if isinstance(m, nn.Linear))
    for layer in (first, second):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    last.weight.data, last.bias.data = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([0.0, 1.0]).double()
    a, b = head(torch.ones(1, 1).double())[0].tolist()

    def gelu(x: float) -> float:
        return x * (1 + erf(x / sqrt(2))) / 2

    assert gelu(1) == pytest.approx(0.841344746, abs=1e-9)  # Phi(1), from a table
    assert a / b == pytest.approx(gelu(gelu(1)), abs=1e-9)


def test_drop_path_keeps_the_mean():
    """DINO, vision_transformer.drop_path (Huang et al. 2016): what is kept is divided by the keep probability. Draws are one
    for each image and branch, the same for all its tokens; the first block has rate 0, the last one the whole.

    A network whose last block adds 1 (attention) and 10 (MLP) to every token: at rate 1/2 an image gets 0 or 2, and 0 or 20.
    """
    torch.manual_seed(0)
    network = ViT(width=8, depth=2, heads=2, patch=8, image_size=16, drop_path=0.5)
    for block in network.blocks:
        for branch in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(branch.weight)
            nn.init.zeros_(branch.bias)
    nn.init.ones_(network.blocks[1].attn.proj.bias)
    nn.init.constant_(network.blocks[1].mlp.fc2.bias, 10)
    network.norm = nn.Identity()  # which would hide what is added to all of a token
    images, points = torch.randn(64, 3, 16, 16), torch.rand(64, 3, 2)
    with torch.no_grad():
        kept = torch.cat([t.view(64, -1, 8) for t in network.eval()(images, points)[:3]], 1)  # [64, 1+4+3, 8]
        dropped = torch.cat([t.view(64, -1, 8) for t in network.train()(images, points)[:3]], 1)
    added = (dropped - kept + 11).flatten(1)
    assert (added - added[:, :1]).abs().max() < 1e-4
    values, counts = added[:, 0].round().unique(return_counts=True)
    assert (added[:, 0] - added[:, 0].round()).abs().max() < 1e-4
    assert values.tolist() == [0, 2, 20, 22]
    assert counts.min() >= 6  # 16 are expected of each


@pytest.mark.parametrize("method", ["dino", "densedino"])
def test_the_teacher_has_no_drop_path(method: str):
    """DINO, main_dino.py: the teacher is built without a drop path rate, and both networks stay in training mode. So in two
    steps with the same batch the loss differs, but what is read off the teacher (its mean logits, entropy) does not."""
    config = Config(method=method, model=Model("custom", 8, 16, 3, 2, 0.5), head=Head(24, 12, 20))
    config.data.views = [Views(2, 16, teacher=True), Views(2, 16)]
    config.reference.points = 2
    torch.manual_seed(0)
    model = build(config).train()
    ids, sides = torch.arange(8), np.full(8, 40)
    views, draws = [torch.randn(4, 8, 3, 16, 16)], draw(config, 0, ids.numpy(), sides, sides).tensors()
    outs = [model(Batch(step, ids, ids, views, **draws), StepValues()) for step in (0, 1)]
    assert outs[0].loss != outs[1].loss
    assert outs[0].metrics["teacher_entropy"] == outs[1].metrics["teacher_entropy"]
    assert outs[0].statistics
    assert all(torch.equal(a, b) for a, b in zip(outs[0].statistics, outs[1].statistics, strict=True))
