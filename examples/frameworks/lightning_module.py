"""API-Net as a LightningModule, with balanced batches, and a backbone that runs chunk by chunk."""

from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from toy import CLASSES, Shapes, make_parser

from apinet_head import APINet, BalancedBatchSampler, api_loss_terms


class APIClassifier(lightning.LightningModule):
    """Its arguments are in the checkpoints: load with `APIClassifier.load_from_checkpoint(path)`."""

    def __init__(self, backbone: str, num_classes: int, lr: float = 2e-3, chunk_size: int | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        # gather: partners from the batches of all processes. With one process it changes nothing.
        self.net = APINet(backbone, num_classes, chunk_size=chunk_size, gather=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        terms = api_loss_terms(self.net(*batch))
        self.log_dict({name: value.detach() for name, value in terms._asdict().items()}, sync_dist=True)
        return terms.total

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        right = (self.net(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameter_groups(self.hparams.lr))


class ShapesData(lightning.LightningDataModule):
    """Balanced batches to train on, and all of the test images."""

    def train_dataloader(self) -> DataLoader[Any]:
        train = Shapes(train=True)
        # Made here and no earlier: by now the processes have found each other, and each gets its own classes.
        sampler = BalancedBatchSampler(train.targets, n_classes=6, n_samples=4)
        # Lightning calls set_epoch as well, but in a resumed run only after worker processes have asked for batches.
        sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        return DataLoader(train, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Shapes(train=False), batch_size=32)


def main(arguments: list[str] | None = None) -> float:
    parser = make_parser(__doc__)
    parser.add_argument("--chunk-size", type=int, default=12, help="images at a time, to save memory")
    kinds = ("auto", "cpu", "gpu", "mps")
    parser.add_argument("--accelerator", choices=kinds, default="auto", help="Lightning's (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=1, help="processes, each with a GPU if there are any")
    args = parser.parse_args(arguments)
    lightning.seed_everything(0)
    try:
        trainer = lightning.Trainer(
            accelerator=args.accelerator, devices=args.devices, max_epochs=args.epochs, logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
            use_distributed_sampler=False,  # the sampler gives each process its share itself
        )  # fmt: skip
    except MisconfigurationException as error:  # there is no such accelerator, or not so many
        raise SystemExit(f"--accelerator {args.accelerator}, --devices {args.devices}: {error}") from None
    trainer.fit(APIClassifier(args.backbone, len(CLASSES), chunk_size=args.chunk_size), datamodule=ShapesData())
    found = float(trainer.callback_metrics["accuracy"])
    if trainer.is_global_zero:
        print(f"test accuracy {found:.1%}")
    return found


if __name__ == "__main__":
    main()
