"""Train API-Net, or the cross-entropy baseline, on one of the paper's five data sets or on the embedded birds.

python examples/train_cub.py                                          # the demo: embedded birds, minutes on a CPU
python examples/train_cub.py --data CUB_200_2011                      # the paper's setup
python examples/train_cub.py --dataset dogs --data StanfordDogs       # the paper's setup for Stanford Dogs
torchrun --nproc_per_node=2 examples/train_cub.py --data CUB_200_2011 # the paper's setup on two GPUs

This file is the recipe, from top to bottom; every setting is in workbench/settings.py.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import accuracy
from torch import Tensor, nn
from tqdm import tqdm

from apinet_head import APINet, BalancedBatchSampler, api_loss_terms, random_pairs
from workbench import model_folder
from workbench.checkpoint import RunState
from workbench.chunk_size import with_chunk_size
from workbench.datasets import ImageSet, open_data
from workbench.datasets.bad_images import ending_at_bad_images
from workbench.distributed import average_gradients, end_all, first_process_first, join_processes
from workbench.guard import advice_on_memory, check_backbone, check_device, making_the_net, nonfinite, noting_signals
from workbench.images import ImageDataset, eval_loader, to_device, train_loader, train_transform
from workbench.metrics import confusion, predict, report, scores
from workbench.model_folder import Model
from workbench.run_folder import RunFolder, describe, write_text
from workbench.settings import HARMLESS, Settings, parse, run_folder
from workbench.weights import load_weights, named

COLUMNS = ["epoch", "step", "lr", "seconds", "loss", "cross_entropy", "ranking", "train_top1", "test_top1", "test_top5"]
COLUMNS += ["skipped", "left_out"]


def make_net(settings: Settings, num_classes: int) -> APINet:
    """The net of both methods: the baseline is the same net, trained without pairs."""
    with making_the_net(settings.backbone, pretrained=settings.pretrained, instead="--no-pretrained"):
        return APINet(
            settings.backbone,
            num_classes,
            pretrained=settings.pretrained,
            chunk_size=int(settings.chunk_size) or None,
            keep_chunks=settings.keep_chunks,
            backbone_args=json.loads(settings.backbone_args),
            hidden_dim=settings.hidden_dim,
            dropout=settings.dropout,
            mutual=settings.mutual,
            gate=settings.gate,
            intra=None if settings.intra == "none" else settings.intra,
            inter=None if settings.inter == "none" else settings.inter,
            gather=settings.pairs == "mined",  # random pairs are drawn among each process's own images
            memory=settings.memory if settings.method == "api" else 0,
        )


def make_sampler(settings: Settings, data: ImageSet) -> BalancedBatchSampler:
    """Batches of n_classes x n_samples images; each of several processes takes its own classes of a batch."""
    if settings.n_classes > len(data.classes):
        raise SystemExit(f"--n-classes {settings.n_classes}: {data.name} has {len(data.classes)} classes")
    try:
        labels = [image.label for image in data.train]
        return BalancedBatchSampler(labels, settings.n_classes, settings.n_samples, seed=settings.seed)
    except ValueError as error:
        raise SystemExit(f"--n-classes, --n-samples: {error}") from None


def make_optimizer(settings: Settings, net: APINet, steps: int) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    """SGD, with a learning rate that decays to zero by a cosine over all steps."""
    # timm's "momentum" is plain SGD, as published; its "sgd" is Nesterov's.
    groups = net.parameter_groups(settings.lr, settings.backbone_lr or None, settings.weight_decay)
    optimizer = create_optimizer_v2(groups, opt="momentum", lr=settings.lr, momentum=settings.momentum)
    return optimizer, CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)


def compute_loss(model: nn.Module, images: Tensor, labels: Tensor, settings: Settings) -> dict[str, Tensor]:
    """The loss with its terms, and the accuracy of this batch."""
    if settings.method == "api":
        pairs = random_pairs(labels, 2 * len(labels)) if settings.pairs == "random" else None
        output = model(images, labels, pairs=pairs)
        how = {name: getattr(settings, name) for name in ("margin", "rank_weight", "label_smoothing")}
        loss, cross_entropy, ranking = api_loss_terms(output, **how)
        logits, targets = output.logits_self, output.labels
    else:
        logits, targets = model(images), labels
        loss = cross_entropy = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        ranking = torch.zeros_like(loss)
    top1 = accuracy(logits.detach(), targets)[0]
    return {"loss": loss, "cross_entropy": cross_entropy, "ranking": ranking, "train_top1": top1}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    weights = Path(settings.weights) if settings.weights else None
    if weights is not None:
        settings = replace(settings, weights=named(weights), pretrained=False)
    if settings.threads:
        torch.set_num_threads(settings.threads)

    # Data. Of several processes, the first prints, draws and downloads before the others.
    processes = join_processes(settings.device)
    with first_process_first():
        check_device(settings.device)
        check_backbone(settings.backbone)
        data = open_data(settings)
    path = run_folder(settings)
    settings = with_chunk_size(settings, path, lambda plain: make_net(plain, len(data.classes)))

    # Net, sampler, optimiser, schedule. The loaders are not prepared by accelerate, which would distribute whole
    # batches among the processes: the sampler gives each process its share of every batch.
    on_cpu = settings.device == "cpu"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=settings.amp, log_with="tensorboard", project_dir=path)
    device = accelerator.device
    with first_process_first():
        folder = RunFolder(path, asdict(settings) | describe(data), HARMLESS, settings.keep_checkpoints)
        set_seed(settings.seed)
        net = make_net(settings, len(data.classes)).to(memory_format=torch.channels_last)  # convolutions like it
        if weights is not None:
            print(load_weights(net.backbone, weights))
        sampler = make_sampler(settings, data)
        numbers = f"{len(data.classes)} classes, {len(data.train)} training and {len(data.test)} test images"
        print(f"{settings.method} on {data.name}: {numbers}; writing to {path}", flush=True)
    optimizer, scheduler = make_optimizer(settings, net, settings.epochs * sampler.n_batches)
    accelerator.prepare_model(net, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(optimizer)
    if processes.process_index:  # same weights on all, but each with dropout of its own
        set_seed(settings.seed, device_specific=True)
    transform = {"squash": settings.resize, "crop": settings.crop, **model_folder.normalization(net)}
    plain = Model(net, data.classes, transform)  # what is saved, whatever it is wrapped in for training
    size, cache, loading = settings.resize, settings.cache_images, (settings.workers, settings.loader_timeout)
    dataset = ImageDataset(data.train, train_transform(transform), resize=size, cache=cache)
    loader = train_loader(dataset, sampler, device, *loading)
    test_loader = eval_loader(data.test, transform, settings.eval_batch, *loading, cache=cache)

    # Start, or resume exactly where the run was interrupted.
    state = RunState(accelerator, net, optimizer, scheduler, sampler)
    folder.go_on(state, settings.epochs)
    accelerator.init_trackers("tensorboard")
    progress = state.progress
    batch_size = settings.n_classes * settings.n_samples // processes.num_processes
    with (
        noting_signals() as noted,
        advice_on_memory(net, batch_size, settings.crop, int(settings.chunk_size)),
        ending_at_bad_images(),
    ):
        for epoch in range(progress.epoch, settings.epochs):
            net.freeze_backbone(epoch < settings.frozen_epochs, batch_norm=settings.frozen_batch_norm)
            model = average_gradients(net)
            model.train()
            sampler.set_epoch(epoch)
            start = time.perf_counter() - progress.seconds
            bar = tqdm(
                loader, desc=f"epoch {epoch + 1}/{settings.epochs}", mininterval=0.5, initial=progress.batch,
                total=sampler.n_batches, disable=not processes.is_main_process,
            )  # fmt: skip
            for images, labels, indices in bar:
                # Forward, loss, backward.
                scheduler.step_update(progress.step)
                buffers = [buffer.clone() for buffer in net.buffers()] if settings.skip_nonfinite else []
                images, labels = to_device(images, device), labels.to(device, non_blocking=True)
                with accelerator.autocast():
                    figures = compute_loss(model, images, labels, settings)
                optimizer.zero_grad()
                accelerator.backward(figures["loss"])

                # Step, unless it isn't finite. Gradients of fp16 may overflow: the scaler then reduces its scale.
                wrong = nonfinite(figures, [] if accelerator.scaler else net.parameters())
                if not wrong:
                    optimizer.step()
                    state.count(figures)
                else:
                    place = f"step {progress.step + 1} (epoch {epoch + 1}, batch {progress.batch + 1})"
                    if progress.skipped >= settings.skip_nonfinite:
                        end_at_nonfinite(place, wrong, [data.train[index].path for index in indices.tolist()], settings)
                    progress.skipped += 1
                    accelerator.print(f"\n{place} is skipped, {progress.skipped} so far, as it is not finite: {wrong}")
                    for buffer, before in zip(net.buffers(), buffers, strict=True):
                        buffer.data.copy_(before)

                # Log and save.
                progress.step, progress.batch = progress.step + 1, progress.batch + 1
                progress.seconds = time.perf_counter() - start
                if progress.batch % 10 == 0 and progress.batch < sampler.n_batches:  # reading waits for the device
                    so_far = means(accelerator, state)
                    bar.set_postfix({name: f"{value:.3g}" for name, value in so_far.items()}, refresh=False)
                folder.save(state, noted.signal, settings.checkpoint_minutes)

            # Test, log and save.
            progress.epoch += 1
            row = {"lr": optimizer.param_groups[-1]["lr"], **means(accelerator, state)}
            row |= {"epoch": progress.epoch, "step": progress.step}
            row |= {"skipped": progress.skipped, "left_out": data.left_out}
            start = time.perf_counter()
            for buffer in net.buffers():  # each process has its own running statistics of BatchNorm
                broadcast(buffer)
            if progress.epoch == settings.epochs or progress.epoch % settings.eval_every == 0:
                row |= scores(*predict(net, test_loader, device))
            row["seconds"] = progress.seconds + time.perf_counter() - start
            record(folder, state, row, plain, settings)
            progress.batch, progress.counted, progress.seconds, state.sums = 0, 0, 0.0, {}
            folder.save(state, noted.signal, settings.checkpoint_minutes)

        # The result: the net after the last epoch, and which classes it confuses.
        logits, labels = predict(net, test_loader, device)
    final = progress.history[-1]
    result = final | confusion(logits, labels, data.classes, data.families)
    result["seconds"] = sum(row["seconds"] for row in progress.history)
    result["best_test_top1"] = best(progress.history)
    if processes.is_main_process:
        with folder.writing():
            save_model(folder, "last", plain, settings, final)
            write_text(path / "result.json", json.dumps(result, indent=2))
        print(f"{settings.method} after {result['epoch']} epochs: {report(result)}")
        print(f"(best epoch, chosen on the test images: top-1 {result['best_test_top1']:.2f} %)")
    accelerator.end_training()
    return result


def means(accelerator: Accelerator, state: RunState) -> dict[str, float]:
    """The epoch's mean figures so far, over all processes; also logged to TensorBoard."""
    if not state.sums:
        return {}
    figures = accelerator.reduce(state.sums, "mean")
    found = {name: float(value) / state.progress.counted for name, value in figures.items()}
    accelerator.log(found, step=state.progress.step)
    return found


def best(history: list[dict[str, float]]) -> float:
    return max((row["test_top1"] for row in history if "test_top1" in row), default=-1.0)


def record(folder: RunFolder, state: RunState, row: dict[str, float], model: Model, settings: Settings) -> None:
    """Write an epoch's figures, and the net if it is the best so far."""
    history, first = state.progress.history, state.accelerator.is_main_process
    with folder.writing():
        if first and row.get("test_top1", -1.0) > best(history):
            save_model(folder, "best", model, settings, row)
        history.append(row)
        tested = {name: value for name, value in row.items() if name.startswith("test")}
        state.accelerator.log(tested, step=state.progress.step)
        if first:
            folder.write_log(history, COLUMNS)


def save_model(folder: RunFolder, name: str, model: Model, settings: Settings, row: dict[str, float]) -> None:
    """Write a model folder, with the run's settings and figures in run.json; it is replaced atomically."""
    with folder.replaced(name) as partial:
        model_folder.save(partial, model)
        write_text(partial / "run.json", json.dumps({"metrics": row, "settings": asdict(settings)}, indent=2))


def end_at_nonfinite(place: str, wrong: str, paths: list[Path], settings: Settings) -> None:
    """End the run before the step; the last checkpoint stays."""
    listing = "\n  ".join(map(str, gather_object(paths)))
    advice = "Correct the images or the settings, or skip such steps with --skip-nonfinite"
    advice = f"No weight was changed by it. {advice} {settings.skip_nonfinite + 10}"
    end_all(f"{place} is not finite: {wrong}\nIts images:\n  {listing}\n{advice}", 1)


if __name__ == "__main__":
    main()
