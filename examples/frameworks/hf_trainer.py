"""API-Net in the Trainer of Hugging Face's transformers."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy import CLASSES, Shapes, make_parser
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from apinet_head import APINet, BalancedBatchSampler, api_loss


class ForTrainer(nn.Module):
    """An APINet as Trainer asks for it: named arguments, none of them `**kwargs`, and a dict with the loss."""

    def __init__(self, net: APINet) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if self.training:
            return {"loss": api_loss(self.net(pixel_values, labels))}
        logits = self.net(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class BalancedTrainer(Trainer):
    """Trains on balanced batches, of which each process gets its own classes."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        sampler = BalancedBatchSampler(self.train_dataset.targets, n_classes=6, n_samples=4, seed=self.args.seed)
        loader = DataLoader(
            self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip
        # As Trainer's own is, so that it calls set_epoch; but not dealt out among the processes once more.
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)


def collate(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    images, labels = zip(*items, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def top1(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean().item()}


def main(arguments: list[str] | None = None) -> float:
    parser = make_parser(__doc__)
    parser.add_argument("--cpu", action="store_true", help="needed for several processes without a GPU")
    about = "where the net goes; default: %(default)s"
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"), help=about)
    args = parser.parse_args(arguments)
    settings = TrainingArguments(
        str(args.out), num_train_epochs=args.epochs, learning_rate=2e-3, per_device_train_batch_size=24,
        use_cpu=args.cpu, report_to="none", save_strategy="no", eval_strategy="epoch", disable_tqdm=True,
        logging_nan_inf_filter=False,  # else the logs hide a loss that isn't finite
    )  # fmt: skip
    set_seed(0)
    trainer = BalancedTrainer(
        # gather: partners from the batches of all processes. With one process it changes nothing.
        ForTrainer(APINet(args.backbone, len(CLASSES), gather=True)), settings, data_collator=collate,
        train_dataset=Shapes(train=True), eval_dataset=Shapes(train=False), compute_metrics=top1,
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        print(f"test accuracy {found:.1%}")
        trainer.model.net.save_pretrained(args.out)  # not Trainer's save_model, which knows no APINet
    return found


if __name__ == "__main__":
    main()
