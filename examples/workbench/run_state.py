"""All that the rest of a run depends on, to save and to restore: weights, optimiser, place in the epoch, chance."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.scheduler.scheduler import Scheduler
from torch import Tensor

from apinet_head import APINet, BalancedBatchSampler, FeatureMemory
from workbench.checkpoint import pack, unpack


@dataclass
class RunState:
    """The parts of a run that change with it.

    Not accelerate's save_state: it keeps random states as pickles, passes over them in silence where it cannot load
    them, and knows nothing of the place in the epoch.
    """

    accelerator: Accelerator
    net: APINet
    optimizer: AcceleratedOptimizer
    scheduler: Scheduler
    sampler: BalancedBatchSampler
    memory: FeatureMemory | None

    def files(self, batches_done: int, sums: dict[str, Tensor]) -> dict[str, bytes]:
        """This process's files of a checkpoint: what is its own, and from the first one, what is the same on all."""
        rank = self.accelerator.process_index
        files = {f"process-{rank}.pt": pack({"random": self.random_states(), "sums": sums})}
        if self.accelerator.is_main_process:
            shared = {name: part.state_dict() for name, part in self._parts().items()}
            files["state.pt"] = pack(shared | {"sampler": self.sampler.state_dict(batches_done)})
        return files

    def load(self, checkpoint: Path) -> dict[str, Tensor]:
        """Restore all; gives back the sums of the epoch's figures.

        Raises:
            SystemExit: another number of processes saved it.
        """
        saved, here = len(list(checkpoint.glob("process-*.pt"))), self.accelerator.num_processes
        if saved != here:
            raise SystemExit(
                f"{checkpoint.parents[1]} holds a run of {saved} process(es), and here are {here}: go on with "
                f"`torchrun --nproc_per_node={saved}`, or choose another --output"
            )
        shared, own = (
            unpack(checkpoint / "state.pt"),
            unpack(checkpoint / f"process-{self.accelerator.process_index}.pt"),
        )
        for name, part in self._parts().items():
            part.load_state_dict(shared[name])
        self.sampler.load_state_dict(shared["sampler"])
        self.set_random_states(own["random"])
        return {name: value.to(self.accelerator.device) for name, value in own["sums"].items()}

    def buffers(self) -> list[Tensor]:
        """What a forward pass changes: running statistics of BatchNorm, the memory of past batches."""
        return [*self.net.buffers(), *(self.memory.buffers() if self.memory is not None else ())]

    def random_states(self) -> dict[str, Any]:
        """Of all generators of this process, in plain types, which load without unpickling code."""
        name, keys, *place = np.random.get_state()
        states = {
            "python": random.getstate(),
            "numpy": (name, keys.tolist(), *place),
            "torch": torch.get_rng_state(),
        }
        if self.accelerator.device.type != "cpu":
            states["device"] = getattr(torch, self.accelerator.device.type).get_rng_state()
        return states

    def set_random_states(self, states: dict[str, Any]) -> None:
        random.setstate(states["python"])
        name, keys, *place = states["numpy"]
        np.random.set_state((name, np.array(keys, np.uint32), *place))
        torch.set_rng_state(states["torch"])
        if self.accelerator.device.type != "cpu":
            getattr(torch, self.accelerator.device.type).set_rng_state(states["device"])

    def _parts(self) -> dict[str, Any]:
        parts = {
            "net": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler, "memory": self.memory,
            "scaler": self.accelerator.scaler,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}
