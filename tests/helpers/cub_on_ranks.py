"""What test_cub_ranks.py has torchrun start: runs of train.py one after the other, and what every rank ends with.

python -m torch.distributed.run ... cub_on_ranks.py '[{"flags": [...], "kill_in_epoch": 3, "plain": true}, ...]'
"""

import json
import os
import signal
import sys

import torch
import torch.distributed as dist
from accelerate import PartialState

import score as evaluate
import train_cub as train
from workbench.images import test_transform

RANK = int(os.environ.get("RANK", "0"))
finish, step = train.Trainer.finish, train.Trainer.step
destroy_process_group = PartialState.destroy_process_group


def run(flags, kill_in_epoch=0, plain=False):
    """Train; with `plain`, without augmentation."""

    def finish_and_tell(self, progress):
        result = finish(self, progress)
        told = {"weights": self.net.state_dict(), "random": torch.get_rng_state(), "result": result}
        torch.save(told, f"{self.folder.path}-rank{RANK}.pt")
        return result

    def die_in_the_second_step(self, images, labels):
        self.steps = getattr(self, "steps", 0) + (self.sampler.epoch + 1 == kill_in_epoch)
        if RANK == 1 and self.steps == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, images, labels)

    train.Trainer.finish, train.Trainer.step = finish_and_tell, die_in_the_second_step
    if plain:
        train.train_transform = test_transform
    train.main(flags)
    output = flags[flags.index("--output") + 1]
    evaluate.main([f"{output}/last", "--device", "cpu", "--json", f"{output}-scores.json"])


if __name__ == "__main__":
    PartialState.destroy_process_group = lambda self, group=None: None  # train.py's last word, but here runs follow
    for one in json.loads(sys.argv[1]):
        run(**one)
    dist.destroy_process_group()
