"""(a) The report's loop, as courses teach it: PIL images, ToTensor, DataLoader, `.item()`."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10

from benchmarks.common import BATCH_SIZE, NETWORKS, Marks, image_sets, parsed
from cifar10.batches import ImageSet


class Pictures(CIFAR10):  # type: ignore[misc]
    """torchvision's data set, with its way to a picture, on images that are there already."""

    def __init__(self, image_set: ImageSet) -> None:
        images, labels, _ = image_set.batch(image_set.indices)
        self.data = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = labels.tolist()
        self.transform = transforms.ToTensor()
        self.target_transform = None


def main() -> None:
    """Train until the process is stopped."""
    args = parsed()
    torch.manual_seed(0)
    train_set, val_set = (Pictures(images) for images in image_sets(args.root))
    train_loader: DataLoader[Any] = DataLoader(train_set, batch_size=BATCH_SIZE, shuffle=True)
    val_loader: DataLoader[Any] = DataLoader(val_set, batch_size=BATCH_SIZE)
    network = NETWORKS[args.network]().to(args.device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-4)
    marks = Marks(args.folder)

    def run(loader: DataLoader[Any], is_training: bool) -> tuple[float, float]:
        network.train(is_training)
        total_loss, correct, total = 0.0, 0, 0
        with torch.set_grad_enabled(is_training):
            for images, labels in loader:
                images, labels = images.to(args.device), labels.to(args.device)
                if is_training:
                    optimizer.zero_grad()
                outputs = network(images)
                loss = criterion(outputs, labels)
                if is_training:
                    loss.backward()
                    optimizer.step()
                total_loss += loss.item() * labels.size(0)
                _, predicted = torch.max(outputs, 1)
                correct += (predicted == labels).sum().item()
                total += labels.size(0)
        return total_loss / total, correct / total

    for epoch in range(args.epochs):
        train_loss, train_acc = run(train_loader, is_training=True)
        val_loss, val_acc = run(val_loader, is_training=False)
        marks.leave(
            epoch, network, optimizer,
            train_loss=train_loss, train_acc=train_acc, val_loss=val_loss, val_acc=val_acc,
        )  # fmt: skip


if __name__ == "__main__":
    main()
