"""Prints the lower bounds of setup.cfg as pins, a line each, for pip's --constraint: see `make test-oldest`."""

import configparser
import re
from pathlib import Path

BOUND = re.compile(r"^([\w-]+)>=([\w.]+)$", re.MULTILINE)


def pins() -> list[str]:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    return sorted({f"{name}=={version}" for text in lists for name, version in BOUND.findall(text)})


if __name__ == "__main__":
    print("\n".join(pins()))
