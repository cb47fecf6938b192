"""Write the drawn birds as a folder: in examples/, python -m birds --output data/birds --contact-sheet birds.png"""

import argparse
from pathlib import Path

from birds.dataset import contact_sheet, write_birds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write the set into")
    numbers = {"species": 200, "images-per-species": 60, "size": 448, "seed": 0, "workers": None}
    for name, default in numbers.items():
        about = f"default: {default}" if default is not None else "processes; default: one for each processor"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=about)
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="also draw an overview of the set")
    arguments = vars(parser.parse_args())
    sheet = arguments.pop("contact_sheet")
    root = write_birds(arguments.pop("output"), **arguments)
    if sheet:
        contact_sheet(root).save(sheet)


if __name__ == "__main__":
    main()
