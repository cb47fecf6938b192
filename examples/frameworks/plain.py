"""API-Net in a training loop of plain PyTorch."""

import torch
from torch.utils.data import DataLoader
from toy import CLASSES, Shapes, accuracy_on, make_parser

from apinet_head import APINet, BalancedBatchSampler, api_loss


def main(arguments: list[str] | None = None) -> float:
    args = make_parser(__doc__).parse_args(arguments)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    train = Shapes(train=True)
    sampler = BalancedBatchSampler(train.targets, n_classes=6, n_samples=4)  # several images of each class to compare
    loader = DataLoader(train, batch_sampler=sampler)
    net = APINet(args.backbone, len(CLASSES)).to(device)
    optimizer = torch.optim.AdamW(net.parameter_groups(lr=2e-3))
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)  # another order
        net.train()
        for images, labels in loader:
            loss = api_loss(net(images.to(device), labels.to(device)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")

    found = accuracy_on(Shapes(train=False), net, device)
    print(f"test accuracy {found:.1%}")
    return found


if __name__ == "__main__":
    main()
