"""Score a trained model: top-1, top-5, and what it confuses within and across families.

python examples/score.py runs/birds-api-resnet10t-seed0/best
torchrun --nproc_per_node=2 examples/score.py runs/birds-api-resnet10t-seed0/best   # on two GPUs
"""

import json
from pathlib import Path
from typing import Any

from workbench import DEVICE, Command, writing
from workbench.compared import open_run
from workbench.datasets.bad_images import ending_at_bad_images
from workbench.distributed import first_process_first, join_processes
from workbench.guard import check_device
from workbench.metrics import confusion, predict, report, scores
from workbench.run_folder import write_text


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = Command(__doc__)
    parser.add_argument("model", type=Path, help="model folder of a run of train_cub.py, such as RUN/best or RUN/last")
    parser.add_argument("--data", help="folder of the same data set (default: the data of the training)")
    parser.add_argument("--device", **DEVICE)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    options = parser.parse_args(arguments)

    processes = join_processes(options.device)
    with first_process_first():
        device = check_device(options.device) if processes.num_processes == 1 else processes.device
        model, _, data, tests = open_run(options.model, options.data)
    with ending_at_bad_images():
        logits, labels = predict(model.net.to(device), tests, device)
    found = {**scores(logits, labels), **confusion(logits, labels, data.classes, data.families)}
    if processes.is_main_process:
        print(report(found))
        if options.json:
            with writing("--json", options.json):
                write_text(options.json, json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    main()
