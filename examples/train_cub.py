"""Train API-Net, or its baseline, on one of the paper's five data sets or on the embedded birds.

python examples/train_cub.py                                          # the demo: embedded birds, minutes on a CPU
python examples/train_cub.py --data CUB_200_2011 --preset paper       # the paper's setup
python examples/train_cub.py --dataset dogs --data StanfordDogs       # the paper's setup for Stanford Dogs
torchrun --nproc_per_node=2 examples/train_cub.py --data CUB_200_2011 # the paper's setup on two GPUs
"""

import time
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from apinet_head import BalancedBatchSampler, api_loss_terms, random_pairs
from score import confusion, predict, report, scores, test_loader
from workbench.augmentation import AugmentedImages, PlacedBatches, leave_signals_to_the_parent
from workbench.breakdowns import end_with_advice
from workbench.build import make_accelerator, make_net
from workbench.chunk_size import with_chunk_size
from workbench.curves import draw_curves
from workbench.datasets.bad_images import ending_at_bad_images
from workbench.datasets.birds_cache import open_data
from workbench.distributed import (
    average_gradients,
    end_all,
    first_process_first,
    highest,
    join_processes,
    share_buffers,
)
from workbench.guard import Before, NonFiniteError, check_finite, keep_and_end
from workbench.images import ImageDataset, ImageSet, train_transform
from workbench.interruption import Interruption
from workbench.look_back import look_back
from workbench.run_folder import Progress, RunFolder
from workbench.run_state import RunState
from workbench.settings import Settings, parse, run_folder


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
        memory = settings.memory if settings.method == "api" else 0
        self.state = RunState(
            self.accelerator, self.net, self.optimizer, self.scheduler, self.sampler,
            look_back(self.net, memory, self.accelerator.device) if memory else None,
        )  # fmt: skip
        if self.accelerator.process_index:  # same weights on all, but each with dropout of its own
            set_seed(settings.seed, device_specific=True)
        images = ImageDataset(
            data.train, train_transform(settings.resize, settings.crop),
            resize=settings.resize, cache=settings.cache_images,
        )  # fmt: skip
        self.loader = DataLoader(
            AugmentedImages(images), batch_sampler=PlacedBatches(self.sampler), num_workers=settings.workers,
            pin_memory=self.accelerator.device.type == "cuda", persistent_workers=settings.workers > 0,
            worker_init_fn=leave_signals_to_the_parent, timeout=settings.loader_timeout if settings.workers else 0,
            generator=torch.Generator(),  # else each start of the loader takes a number from the net's chance
        )  # fmt: skip
        self.test_loader = test_loader(data, settings)
        self.interruption, self.saved = Interruption(), time.monotonic()

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch, from where the run folder is; the run's result."""
        self.accelerator.wait_for_everyone()  # others still look whether the folder is free
        with first_process_first():
            if self.accelerator.is_main_process:
                self.folder.begin()
            self.accelerator.init_trackers("tensorboard")
            progress, sums = self.folder.load_state(self.state)
            if progress.step:
                place = f"epoch {progress.epoch} of {self.settings.epochs}"
                place += f" and {progress.batch} of {self.sampler.n_batches} batches" if progress.batch else ""
                print(f"going on after {place}", flush=True)
        with self.interruption:
            while progress.epoch < self.settings.epochs:
                self.net.freeze_backbone(
                    progress.epoch < self.settings.frozen_epochs, batch_norm=self.settings.frozen_batch_norm
                )
                self.model = average_gradients(self.net)
                row = self.train_epoch(progress, sums)
                self.end_epoch(progress, row)
                sums = {}
        return self.finish(progress)

    def train_epoch(self, progress: Progress, sums: dict[str, Tensor]) -> dict[str, float]:
        """One pass, or what is left of it; the means of loss, its terms and accuracy over the epoch."""
        self.model.train()
        self.sampler.set_epoch(progress.epoch)
        start, batches = time.perf_counter() - progress.seconds, self.sampler.n_batches
        bar = tqdm(
            self.loader, desc=f"epoch {progress.epoch + 1}/{self.settings.epochs}", mininterval=0.5,
            initial=progress.batch, total=batches, disable=not self.accelerator.is_main_process,
        )  # fmt: skip
        for images, labels, indices in bar:
            self.scheduler.step_update(progress.step)
            before = Before(self.state)
            try:
                figures = self.step(images, labels)
            except NonFiniteError as error:
                self.leave_out(progress, error, before, [images, labels, indices])
            else:
                sums |= {name: sums[name] + value if name in sums else value for name, value in figures.items()}
                progress.counted += 1
            progress.step, progress.batch = progress.step + 1, progress.batch + 1
            progress.seconds = time.perf_counter() - start
            if progress.batch % 10 == 0 and progress.batch < batches:  # reading a figure waits for the device
                bar.set_postfix(
                    {name: f"{value:.3g}" for name, value in self.means(progress, sums).items()}, refresh=False
                )
            self.save_in_between(progress, sums)
        return {"lr": self.optimizer.param_groups[-1]["lr"], **self.means(progress, sums)}

    def means(self, progress: Progress, sums: dict[str, Tensor]) -> dict[str, float]:
        """The epoch's figures so far, of all processes."""
        if not sums:
            return {}
        reduced = self.accelerator.reduce(sums, "mean")
        means = {name: float(value) / progress.counted for name, value in reduced.items()}
        with self.folder.writing():
            self.accelerator.log(means, step=progress.step)
        return means

    def save_in_between(self, progress: Progress, sums: dict[str, Tensor]) -> None:
        """Save within an epoch if it is time, or if a signal asks to stop; in that case, stop."""
        minutes = self.settings.checkpoint_minutes
        due = bool(minutes) and time.monotonic() - self.saved > 60 * minutes and progress.batch < self.sampler.n_batches
        stop, due = highest([self.interruption.signal, due])
        if stop or due:
            self.folder.save_state(self.state, progress, sums)
            self.saved = time.monotonic()
        if stop:
            self.stop(int(stop), progress)

    def stop(self, signal: int, progress: Progress) -> None:
        checkpoint = self.folder.path / "state" / progress.name
        end_all(f"stopped by signal {signal}, saved as {checkpoint}; the same command goes on from there", 128 + signal)

    def leave_out(self, progress: Progress, error: NonFiniteError, before: Before, batch: list[Tensor]) -> None:
        """Go on without this step, if the settings allow it; else keep what replays it, and end the run."""
        before.restore_buffers()
        self.optimizer.zero_grad()
        place = f"step {progress.step + 1} (epoch {progress.epoch + 1}, batch {progress.batch + 1})"
        if progress.skipped < self.settings.skip_nonfinite:
            progress.skipped += 1
            self.accelerator.print(f"\n{place} is left out, {progress.skipped} so far, as it is not finite: {error}")
            return
        before.restore_chance()
        images, labels, indices = batch
        paths = [str(self.data.train[index].path) for index in indices.tolist()]
        keep_and_end(self.folder, self.state, progress, images, labels, paths, f"{place} is not finite: {error}")

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One update; loss, its terms and the accuracy of this batch, on the device.

        Raises:
            NonFiniteError: there was no update, for it would not be finite.
        """
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
        # Scaled gradients of fp16 may overflow, which the scaler answers by a smaller scale.
        learned = [] if self.accelerator.scaler else self.net.parameters()
        check_finite({"loss": loss, "cross_entropy": cross_entropy, "ranking": ranking}, learned)
        self.optimizer.step()
        return {
            "loss": loss.detach(),
            "cross_entropy": cross_entropy.detach(),
            "ranking": ranking.detach(),
            "train_top1": accuracy(logits.detach(), targets)[0],
        }

    def end_epoch(self, progress: Progress, row: dict[str, float]) -> None:
        """Test the net, note the epoch's figures, and save what is to outlive this process."""
        start = time.perf_counter()
        share_buffers(self.net)
        progress.epoch += 1
        row |= {
            "epoch": progress.epoch,
            "step": progress.step,
            "skipped": progress.skipped,
            "left_out": self.data.left_out,
        }
        if progress.epoch == self.settings.epochs or progress.epoch % self.settings.eval_every == 0:
            row |= scores(*predict(self.net, self.test_loader, self.accelerator.device))
        row["seconds"] = progress.seconds + time.perf_counter() - start
        with self.folder.writing():
            self.record(progress, row)
        progress.batch, progress.counted, progress.seconds = 0, 0, 0.0
        self.folder.save_state(self.state, progress, {})
        self.saved = time.monotonic()
        if signal := highest([self.interruption.signal])[0]:  # it came during the test
            self.stop(int(signal), progress)

    def record(self, progress: Progress, row: dict[str, float]) -> None:
        """Write an epoch's figures, and the net if it is the best so far."""
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
            with self.folder.writing():
                self.folder.save_model("last", self.net, self.settings, self.data.classes, final)
                self.folder.write_result(result)
        self.accelerator.end_training()
        return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    processes = join_processes(settings.device)
    with first_process_first():
        data = open_data(settings)
    classes = len(data.classes)
    settings = with_chunk_size(settings, run_folder(settings), lambda plain: make_net(plain, classes))
    with first_process_first():
        try:
            folder = RunFolder(run_folder(settings), settings, data)
        except FileExistsError as error:
            raise SystemExit(str(error)) from None
        print(
            f"{settings.method} on {data.name}: {len(data.classes)} classes, {len(data.train)} training and "
            f"{len(data.test)} test images; writing to {folder.path}",
            flush=True,
        )
        trainer = Trainer(settings, data, folder)
    with end_with_advice(settings, folder, trainer.net, lambda plain: make_net(plain, classes)), ending_at_bad_images():
        result = trainer.fit()
    if processes.is_main_process:
        print(f"{settings.method} after {result['epoch']} epochs: {report(result)}")
        print(f"(best epoch, chosen on the test images: top-1 {result['best_test_top1']:.2f} %)")
    return result


if __name__ == "__main__":
    main()
