"""examples/own_images/train.py under a name of its own, for examples/cub has a train.py as well."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples/own_images/train.py"
SPEC = importlib.util.spec_from_file_location("own_images_train", SCRIPT)
own_train = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(own_train)
