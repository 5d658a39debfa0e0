"""Export a trained backbone: a folder in timm's hub format, and ONNX.

    python -m tools.export NETWORK DST [--onnx]

NETWORK is a run folder, a checkpoint, a backbone file, weights of DINO, DenseDINO, Leopart, MoCo-v3 or timm, or
timm:NAME. A ResNet is refused: timm loads the files of others by itself.

    DST/model.safetensors   the backbone under timm's names
    DST/config.json         architecture, its arguments, input size and normalization, in timm's hub format
    DST/model.onnx          --onnx: normalized images float32 [batch,3,S,S] -> cls [batch,D], patches [batch,N,D]

The last lines printed are the Python that loads it; it needs timm only. Before the program reports success, timm loads the
export, and its features are compared with those of the network here; with --onnx, ONNX Runtime's too.

The features are equal for images of the size S that the network was trained for. For other sizes timm resizes the position
grid to exactly h x w patches with antialiasing; the published code samples it at (h + 0.1) / 14 (28.1 / 14 for 448 pixels)
without antialiasing. Features are then close, not equal: for published figures use `python -m eval`, which keeps the rule.

A network trained with reference.attention: all_query is refused: its patches never attend to [CLS], but those of a plain
ViT do. With every other mode (`none` too) a network without reference tokens is a plain ViT.

S side of an image, pixels · D width · N patches.
"""

from pathlib import Path

from runtime.errors import UserError, run_cli, suggest_path
from tools.docstring import make_parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("tools.export", "tools.export.__main__")
    parser.add_argument("network", help="a run folder, a checkpoint, weights of any known format, or timm:NAME")
    parser.add_argument("dst", type=Path, help="the folder to write")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too")
    args = parser.parse_args(argv)
    path = Path(args.network)
    if not args.network.startswith("timm:") and not path.exists():
        raise UserError(f"{path}: no such run, checkpoint or backbone file{suggest_path(path)}")

    from model.vit import require_vit
    from model.weights import load_backbone, timm_call
    from tools.export.timm_folder import export

    vit = require_vit(load_backbone(args.network), args.network, "an export")
    differences = export(vit, args.dst, args.onnx)
    print(f"{args.dst}: {', '.join(sorted(p.name for p in args.dst.iterdir()))}")
    print(f"images of {vit.image_size} px have the same features here and in {' and '.join(differences)}")
    print(timm_call(vit, args.dst / "model.safetensors"))
    print(f'timm.create_model("local-dir:{args.dst}", pretrained=True)  # the same, by config.json')


if __name__ == "__main__":
    run_cli(main)
