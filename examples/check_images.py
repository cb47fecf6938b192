"""Check a data set before training: decode all images in its lists as training does, and list the bad ones.

python examples/check_images.py CUB_200_2011
python examples/check_images.py stanford_cars --dataset cars --output bad_cars.txt

The list of bad images, with reasons, is for `train_cub.py --skip-bad`. The exit status is 1 if an image is bad, or if
the data set's own lists are. workbench/image_files.py says what is accepted.
"""

import sys
from pathlib import Path

from workbench import Command, number, processors, shown, writing
from workbench.datasets import ARCHIVES, read
from workbench.datasets.bad_images import LIST, find_bad, write_list


def main(arguments: list[str] | None = None) -> list[tuple[Path, str]]:
    """The bad images with the reasons."""
    parser = Command(__doc__)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set, as for train_cub.py --data")
    parser.add_argument("--dataset", choices=ARCHIVES, default="cub", help="the data set")
    parser.add_argument("--output", type=Path, default=LIST, metavar="FILE", help="the list")
    parser.add_argument("--workers", type=number(int, 0), default=processors(), help="processes that decode; 0: none")
    options = parser.parse_args(arguments)

    data = read(options.dataset, options.data, complete=False)
    images = [image.path for image in data.train + data.test]
    bad = find_bad(images, options.workers)
    with writing("--output", Path(options.output)):
        write_list(Path(options.output), options.data, bad)
    for path, reason in bad:
        print(shown(f"{path}: {reason}"))
    print(f"{len(images)} images of {data.name}, {len(bad)} bad; the list is {options.output}")
    return bad


if __name__ == "__main__":
    sys.exit(bool(main()))
