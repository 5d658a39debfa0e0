"""Paint a small labeled data set, from which a network learns in minutes on a CPU.

    python -m tools.make_scenes DST [--train 3000] [--val 1000] [--size 48] [--seed 0]

A scene holds four things of like size on a patchwork background: three of the scene's class, one of another. A class is a
shape with a texture of its own, in two complementary hues of its own that are swapped at random. Place, size, angle, period,
contrast and lightness differ from thing to thing alike in all classes, and every background has all hues, because a network
learns whatever is constant within a picture and unrelated to the class instead of the class. A scene is a pure function of
(seed, split, number, size).

    DST/JPEGImages/<id>.jpg  SegmentationClass/<id>.png  ImageSets/Segmentation/{train,val}.txt    Pascal VOC's layout
    DST/train/<class>/<id>.jpg  val/<class>/<id>.jpg                    the same files, by the scene's class
    DST/classes.txt                                                     names, background ("ground") first
    DST/scenes.json                                                     the settings, written last: the set is complete

Classes: tools/scenes/classes.py. Painting: tools/scenes/paint.py.
"""

from pathlib import Path

from runtime.errors import UserError, run_cli
from tools.docstring import make_parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("tools.make_scenes", "tools.make_scenes")
    parser.add_argument("dst", type=Path, help="the folder to write")
    parser.add_argument("--train", type=int, default=3000, help="scenes to train on (default %(default)s)")
    parser.add_argument("--val", type=int, default=1000, help="scenes to evaluate on (default %(default)s)")
    parser.add_argument("--size", type=int, default=48, help="pixels of a side (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    args = parser.parse_args(argv)
    for name, minimum in (("train", 1), ("val", 1), ("size", 16), ("seed", 0)):
        if getattr(args, name) < minimum:
            raise UserError(f"--{name}: at least {minimum}, this is {getattr(args, name)}")
    if args.seed >= 2**63:
        raise UserError(f"--seed: below 2^63, this is {args.seed}")
    from tools.scenes.folder import make_scenes

    make_scenes(args.dst, train=args.train, val=args.val, size=args.size, seed=args.seed)


if __name__ == "__main__":
    run_cli(main)
