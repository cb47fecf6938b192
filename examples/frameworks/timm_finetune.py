"""API-Net with what timm has for training: model, transform, optimiser, schedule, meters, and the weights' average."""

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch.utils.data import DataLoader
from toy import CLASSES, SIZE, Shapes, accuracy_on, make_parser

from apinet_head import APINet, BalancedBatchSampler, api_loss


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = make_parser(__doc__).parse_args(arguments)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # Some models are made for one size of images.
    settings = {"img_size": SIZE} if timm.get_pretrained_cfg(args.backbone).fixed_input_size else {}
    settings["drop_path_rate"] = 0.05
    net = APINet(args.backbone, len(CLASSES), backbone_args=settings).to(device)
    config = resolve_model_data_config(net) | {"input_size": (3, SIZE, SIZE), "crop_pct": 1.0}
    augmented = create_transform(**config, is_training=True, scale=(0.7, 1.0), color_jitter=0.1)
    train, test = Shapes(True, augmented), Shapes(False, create_transform(**config))
    # Not timm's create_loader, which has no place for a batch sampler.
    sampler = BalancedBatchSampler(train.targets, n_classes=6, n_samples=4)
    loader = DataLoader(train, batch_sampler=sampler)

    # timm leaves biases and norms, and what the backbone names in no_weight_decay(), without weight decay.
    optimizer = create_optimizer_v2(net, opt="adamw", lr=4e-3, weight_decay=0.05, layer_decay=0.9)
    scheduler, epochs = create_scheduler_v2(
        optimizer, num_epochs=args.epochs, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    ema = ModelEmaV3(net, decay=0.99, use_warmup=True)
    step = 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        net.train()
        losses, top1 = AverageMeter(), AverageMeter()
        for images, labels in loader:
            output = net(images.to(device), labels.to(device))
            loss = api_loss(output)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            ema.update(net, step)
            losses.update(loss.item(), len(images))
            top1.update(accuracy(output.logits_self, output.labels)[0].item(), len(images))
        print(f"epoch {epoch + 1}: loss {losses.avg:.3f}, training top-1 of the pairs' images {top1.avg:.1f} %")

    found = {"net": accuracy_on(test, net, device), "average": accuracy_on(test, ema.module, device)}
    print(f"test accuracy {found['net']:.1%}, of the weights' average {found['average']:.1%}")
    return found


if __name__ == "__main__":
    main()
