"""Table 1: every method of the paper, trained by one trainer on the same photos, and two controls.

The figures are those of the paper (arXiv:2306.04654). Its rows are of several origins (docs/fidelity.md).
"""

from collections.abc import Sequence

from runtime.config import Config, load_config
from tools.paper.tables import CLS, DINO, PUBLISHED, SEG, Row, Table

CONFIGS = {"small": "scenes", "paper": "vits16"}  # scale: ending of the methods' config files
METHODS = {  # row: its label and the paper's figures
    "swav": ("SwAV", {CLS: 66.3, SEG: 49.0}),
    "mocov2": ("MoCo-v2", {CLS: 64.4, SEG: 45.0}),
    "densecl": ("DenseCL", {SEG: 49.0}),
}


def make_table1(base: Config, scale: str, words: Sequence[str]) -> Table:
    """The table of a base config: DenseDINO on the views that it has. words: over every config."""
    ending = CONFIGS[scale]
    leopart = f"configs/leopart_{ending}.yaml"
    longer = base.optim.epochs + load_config(leopart, words).optim.epochs
    rows = [
        Row("dino", "DINO", (*DINO, *PUBLISHED), paper={CLS: 70.4, SEG: 56.1}),
        Row("densedino", "DenseDINO", PUBLISHED, baseline="dino", paper={CLS: 69.7, SEG: 63.3}),
        Row(
            "leopart", "Leopart, from DINO", config=leopart, start="dino", baseline="dino", paper={CLS: 61.0, SEG: 64.6}
        ),
    ]
    rows += [
        Row(name, label, config=f"configs/{name}_{ending}.yaml", baseline="dino", paper=paper)
        for name, (label, paper) in METHODS.items()
    ]
    rows += [  # the controls
        Row("dino-longer", "DINO, Leopart's steps too", (*DINO, *PUBLISHED, f"optim.epochs={longer:g}"), baseline="dino"),
        Row(
            "untrained", "untrained", start="dino", untrained=True, optional=True, baseline="dino",
            expected={CLS: -1, SEG: -1},
        ),
    ]  # fmt: skip
    source = (
        "Table 1 of the paper: ViT-S/16 on ImageNet. DINO, DenseDINO, Leopart: its own runs, 300 epochs, of Leopart 50 "
        "more. It cites DINO after 800 epochs too, 74.4 and 50.6, and Leopart after 50 more, 52.0 and 68.9. SwAV, MoCo-v2, "
        "DenseCL: cited, their mIoU probably of ResNet-50. Its claims: mIoU of DINO is below that of DenseDINO and of "
        "Leopart, k-NN of Leopart is below that of DINO."
    )
    measures = ("knn", "linear_seg", "cluster_seg")
    return Table("table1", "Table 1: methods", source, tuple(rows), measures=measures)
