"""What test_cub_ranks.py has torchrun start: runs of train_cub.py one after the other, and what every rank ends with.

python -m torch.distributed.run ... cub_on_ranks.py '[{"flags": [...], "kill_in_step": 8, "plain": true}, ...]'
"""

import json
import os
import signal
import sys

import torch
import torch.distributed as dist
from accelerate import PartialState

import score
import train_cub
from workbench.images import eval_transform, train_transform

RANK = int(os.environ.get("RANK", "0"))
compute_loss = train_cub.compute_loss


def run(flags, kill_in_step=0, plain=False):
    """Train; with `plain`, without augmentation. Rank 1 can be killed in a step."""
    models = []

    def noted(model, *others):
        models.append(model.module)
        if RANK == 1 and len(models) == kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute_loss(model, *others)

    train_cub.compute_loss = noted
    train_cub.train_transform = eval_transform if plain else train_transform
    result = train_cub.main(flags)
    output = flags[flags.index("--output") + 1]
    told = {"weights": models[-1].state_dict(), "random": torch.get_rng_state(), "result": result}
    torch.save(told, f"{output}-rank{RANK}.pt")
    score.main([f"{output}/last", "--device", "cpu", "--json", f"{output}-scores.json"])


if __name__ == "__main__":
    PartialState.destroy_process_group = lambda self, group=None: None  # a run's last word, but here others follow
    for one in json.loads(sys.argv[1]):
        run(**one)
    dist.destroy_process_group()
