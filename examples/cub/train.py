"""Train API-Net, or its baseline, on one of the paper's five data sets or on the embedded birds.

python examples/cub/train.py                                          # the demo: embedded birds, minutes on a CPU
python examples/cub/train.py --data CUB_200_2011 --preset paper       # the paper's setup
python examples/cub/train.py --dataset dogs --data StanfordDogs       # the paper's setup for Stanford Dogs
torchrun --nproc_per_node=2 examples/cub/train.py --data CUB_200_2011 # the paper's setup on two GPUs
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from birds_cache import open_data
from chunk_auto import with_chunk_size
from curves import draw_curves
from data import ImageDataset, ImageSet, train_transform
from evaluate import confusion, predict, report, scores, test_loader
from look_back import look_back
from processes import average_gradients, first_process_first, join_processes, share_buffers
from run_folder import Progress, RunFolder
from settings import Settings, parse, run_folder
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from apinet_head import APINet, BalancedBatchSampler, api_loss_terms, random_pairs


class Trainer:
    """One run: the net, its optimiser and schedule, and the images, as the settings say."""

    def __init__(self, settings: Settings, data: ImageSet, folder: RunFolder) -> None:
        self.settings, self.data, self.folder = settings, data, folder
        self.accelerator = make_accelerator(settings, folder.path)
        set_seed(settings.seed)
        self.net = make_net(settings, len(data.classes)).to(memory_format=torch.channels_last)  # convolutions like it
        # timm's "momentum" is plain SGD, as published; its "sgd" is Nesterov's.
        optimizer = create_optimizer_v2(
            self.net.parameter_groups(settings.lr, settings.backbone_lr or None, settings.weight_decay),
            opt="momentum",
            lr=settings.lr,
            momentum=settings.momentum,
        )
        self.sampler = BalancedBatchSampler(
            [image.label for image in data.train], settings.n_classes, settings.n_samples, seed=settings.seed
        )
        steps = settings.epochs * len(self.sampler)
        self.scheduler = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
        # The loaders stay as they are: accelerate would deal the sampler's batches out among the processes, but each
        # batch is one set of classes to compare, and the sampler itself gives each process its share.
        self.accelerator.prepare_model(self.net, evaluation_mode=True)
        self.model: nn.Module = self.net  # `fit` wraps it where there are many processes
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        if settings.memory and settings.method == "api":
            look_back(self.net, settings.memory, self.accelerator)
        if self.accelerator.process_index:  # same weights on all, but each with dropout and augmentation of its own
            set_seed(settings.seed, device_specific=True)
        images = ImageDataset(
            data.train, train_transform(settings.resize, settings.crop),
            resize=settings.resize, cache=settings.cache_images,
        )  # fmt: skip
        self.loader = DataLoader(
            images, batch_sampler=self.sampler, num_workers=settings.workers,
            pin_memory=self.accelerator.device.type == "cuda", persistent_workers=settings.workers > 0,
        )  # fmt: skip
        self.test_loader = test_loader(data, settings)

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch, from where the run folder is; the run's result."""
        with first_process_first():
            progress = self.folder.load_state(self.accelerator)
            if progress.epoch:
                print(f"going on after epoch {progress.epoch} of {self.settings.epochs}", flush=True)
        while progress.epoch < self.settings.epochs:
            start = time.perf_counter()
            self.net.freeze_backbone(
                progress.epoch < self.settings.frozen_epochs, batch_norm=self.settings.frozen_batch_norm
            )
            self.model = average_gradients(self.net)
            row = self.train_epoch(progress)
            share_buffers(self.net)
            progress.epoch += 1
            row |= {"epoch": progress.epoch, "step": progress.step, "seconds": time.perf_counter() - start}
            if progress.epoch == self.settings.epochs or progress.epoch % self.settings.eval_every == 0:
                row |= scores(*predict(self.net, self.test_loader, self.accelerator.device))
            self.record(progress, row)
        return self.finish(progress)

    def train_epoch(self, progress: Progress) -> dict[str, float]:
        """One pass; the means of loss, its terms and accuracy over the epoch."""
        self.model.train()
        self.sampler.set_epoch(progress.epoch)
        sums: dict[str, Tensor | float] = {}
        title = f"epoch {progress.epoch + 1}/{self.settings.epochs}"
        bar = tqdm(self.loader, desc=title, mininterval=0.5, disable=not self.accelerator.is_main_process)
        for count, (images, labels, _) in enumerate(bar, start=1):
            self.scheduler.step_update(progress.step)
            figures = self.step(images, labels)
            progress.step += 1
            sums = {name: sums.get(name, 0.0) + value for name, value in figures.items()}
            if count % 10 == 0 or count == len(self.loader):  # reading a figure waits for the device
                means = {name: float(value) / count for name, value in self.accelerator.reduce(sums, "mean").items()}
                bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()}, refresh=False)
                self.accelerator.log(means, step=progress.step)
        return {"lr": self.optimizer.param_groups[-1]["lr"], **means}

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One update; loss, its terms and the accuracy of this batch, on the device."""
        device, settings = self.accelerator.device, self.settings
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        with self.accelerator.autocast():
            if settings.method == "api":
                pairs = random_pairs(labels, 2 * len(labels)) if settings.pairs == "random" else None
                output = self.model(images, labels, pairs=pairs)
                terms = api_loss_terms(
                    output,
                    margin=settings.margin,
                    rank_weight=settings.rank_weight,
                    label_smoothing=settings.label_smoothing,
                )
                loss, cross_entropy, ranking = terms
                logits, targets = output.logits_self, output.labels
            else:
                logits, targets = self.model(images), labels
                loss = cross_entropy = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
                ranking = torch.zeros_like(loss)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        return {
            "loss": loss.detach(),
            "cross_entropy": cross_entropy.detach(),
            "ranking": ranking.detach(),
            "train_top1": accuracy(logits.detach(), targets)[0],
        }

    def record(self, progress: Progress, row: dict[str, float]) -> None:
        """Note an epoch's figures, and save what is to outlive this process."""
        first = self.accelerator.is_main_process
        if first and row.get("test_top1", -1.0) > progress.best:
            self.folder.save_model("best", self.net, self.settings, self.data.classes, row)
        progress.history.append(row)
        tested = {name: value for name, value in row.items() if name.startswith("test")}
        self.accelerator.log(tested, step=progress.step)
        if first:
            self.folder.write_log(progress.history)
        if first and tested:
            draw_curves(progress.history, self.folder.path / "curves.png")
        self.folder.save_state(self.accelerator, progress)

    def finish(self, progress: Progress) -> dict[str, Any]:
        """Save the net as it is after the last epoch, and what it confuses."""
        final = progress.history[-1]
        logits, labels = predict(self.net, self.test_loader, self.accelerator.device)
        result = {
            **final,
            **confusion(logits, labels, self.data.classes, self.data.families),
            "seconds": sum(row["seconds"] for row in progress.history),
            "best_test_top1": progress.best,
        }
        if self.accelerator.is_main_process:
            self.folder.save_model("last", self.net, self.settings, self.data.classes, final)
            self.folder.write_result(result)
        self.accelerator.end_training()
        return result


def make_accelerator(settings: Settings, folder: Path) -> Accelerator:
    """Device, mixed precision and logging by accelerate."""
    accelerator = Accelerator(
        cpu=settings.device == "cpu", mixed_precision=settings.amp, log_with="tensorboard", project_dir=folder
    )
    if settings.device not in ("auto", accelerator.device.type):
        raise SystemExit(f"--device {settings.device} is not to be had here: torch finds {accelerator.device.type}")
    accelerator.init_trackers("tensorboard")
    return accelerator


def make_net(settings: Settings, num_classes: int) -> APINet:
    """The net of either method: the baseline is the same one, trained without pairs."""
    return APINet(
        settings.backbone,
        num_classes,
        pretrained=settings.pretrained,
        chunk_size=settings.chunk_size or None,
        backbone_args=json.loads(settings.backbone_args),
        hidden_dim=settings.hidden_dim,
        dropout=settings.dropout,
        mutual=settings.mutual,
        gate=settings.gate,
        intra=None if settings.intra == "none" else settings.intra,
        inter=None if settings.inter == "none" else settings.inter,
        gather=settings.pairs == "mined",  # random pairs are drawn among each process's own images
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    processes = join_processes(settings.device)
    with first_process_first():
        data = open_data(settings)
        settings = with_chunk_size(settings, run_folder(settings), lambda plain: make_net(plain, len(data.classes)))
        try:
            folder = RunFolder(run_folder(settings), settings)
        except FileExistsError as error:
            raise SystemExit(str(error)) from None
        print(
            f"{settings.method} on {data.name}: {len(data.classes)} classes, {len(data.train)} training and "
            f"{len(data.test)} test images; writing to {folder.path}",
            flush=True,
        )
        trainer = Trainer(settings, data, folder)
    result = trainer.fit()
    if processes.is_main_process:
        print(f"{settings.method} after {result['epoch']} epochs: {report(result)}")
        print(f"(best epoch, chosen on the test images: top-1 {result['best_test_top1']:.2f} %)")
    return result


if __name__ == "__main__":
    main()
