"""Models of train_cub.py that have learnt nothing, to run commands on."""

import json
from dataclasses import asdict

from cub_runs import begun

from workbench import model_folder
from workbench.datasets.bird_lists import read_cub


def save_untrained(birds, folder, *flags):
    """The model folder of a net as it begins, as train_cub.py writes it; its normalisation is not ImageNet's."""
    settings, net = begun(birds, "--backbone-args", '{"output_stride": 8}', *flags)  # whose last map is 4 x 4
    transform = {"squash": settings.resize, "crop": settings.crop, "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    folder.mkdir(parents=True)
    model_folder.save(folder, model_folder.Model(net, read_cub(birds).classes, transform))
    (folder / "run.json").write_text(json.dumps({"metrics": {}, "settings": asdict(settings)}))
    return folder
