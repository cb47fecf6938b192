"""API-Net in a loop with accelerate: any number of processes, mixed precision.

torchrun --nproc_per_node=2 examples/frameworks/accelerate_loop.py --cpu   # or accelerate launch
"""

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from toy import CLASSES, Shapes, make_parser

from apinet_head import APINet, BalancedBatchSampler, api_loss


def main(arguments: list[str] | None = None) -> float:
    parser = make_parser(__doc__)
    parser.add_argument("--mixed-precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--cpu", action="store_true", help="needed for several processes without a GPU")
    args = parser.parse_args(arguments)
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)
    set_seed(0)

    train = Shapes(train=True)
    # Made after the Accelerator, by which the processes find each other: each gets its own classes of every batch.
    sampler = BalancedBatchSampler(train.targets, n_classes=6, n_samples=4)
    # Not accelerator.prepare(loader): that would deal the batches, which are shared out already, out once more.
    loader = prepare_data_loader(
        DataLoader(train, batch_sampler=sampler), accelerator.device, num_processes=1, process_index=0,
        put_on_device=True,
    )  # fmt: skip
    # gather: partners from the batches of all processes. With one process it changes nothing.
    net = APINet(args.backbone, len(CLASSES), gather=True)
    optimizer = torch.optim.AdamW(net.parameter_groups(lr=2e-3))
    test_loader = DataLoader(Shapes(train=False), batch_size=32)
    net, optimizer, test_loader = accelerator.prepare(net, optimizer, test_loader)
    set_seed(0, device_specific=True)  # dropout of its own for each process

    for epoch in range(args.epochs):
        loader.set_epoch(epoch)  # the loader's: it tells the sampler, and would undo what the sampler alone was told
        net.train()
        for images, labels in loader:
            loss = api_loss(net(images, labels))
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")

    net.eval()
    right = []
    for images, labels in test_loader:
        with torch.no_grad():
            right.append(accelerator.gather_for_metrics(net(images).argmax(1) == labels))
    found = torch.cat(right).float().mean().item()
    accelerator.print(f"test accuracy {found:.1%}")
    accelerator.end_training()
    return found


if __name__ == "__main__":
    main()
