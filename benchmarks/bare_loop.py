"""(c) A bare loop on tensors in memory; (d) the same as fast as this device can: compiled, and on a
GPU one CUDA graph for the whole step."""

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import BATCH_SIZE, NETWORKS, Marks, image_sets, parsed
from datamodule import EVAL_BATCH_SIZES


def main(is_best: bool) -> None:
    """Train until the process is stopped."""
    args = parsed()
    torch.manual_seed(0)
    train_set, val_set = (
        type(images)(*(tensor.to(args.device) for tensor in images))
        for images in image_sets(args.root)
    )
    network = NETWORKS[args.network]().to(args.device)
    is_graph = is_best and args.device == "cuda"
    optimizer = torch.optim.Adam(
        network.parameters(), lr=5e-4, fused=is_best or None, capturable=is_graph
    )
    totals = torch.zeros(2, device=args.device)  # loss and right predictions
    marks = Marks(args.folder)

    def loss_of(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(pixels / 255)
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()

    fast_loss_of = torch.compile(loss_of, dynamic=False) if is_best else loss_of

    def step(indices: Tensor, loss_of=loss_of) -> None:  # type: ignore[no-untyped-def]
        batch = train_set.batch(indices)
        loss, correct = loss_of(batch.images, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.add_(torch.stack([loss.detach() * len(indices), correct]))

    replay = _graph(lambda indices: step(indices, fast_loss_of), train_set.indices) if is_graph else None
    for epoch in range(args.epochs):
        network.train()
        totals.zero_()
        order = train_set.indices[torch.randperm(train_set.size()).to(args.device)]
        for indices in order.split(BATCH_SIZE):
            if len(indices) < BATCH_SIZE:
                step(indices)
            elif replay is not None:
                replay(indices)
            else:
                step(indices, fast_loss_of)
        train_loss, train_acc = (totals / train_set.size()).tolist()

        network.eval()
        totals.zero_()
        with torch.inference_mode():
            for indices in val_set.indices.split(EVAL_BATCH_SIZES[args.device]):
                batch = val_set.batch(indices)
                loss, correct = loss_of(batch.images, batch.labels)
                totals.add_(torch.stack([loss * len(indices), correct]))
        val_loss, val_acc = (totals / val_set.size()).tolist()
        marks.leave(
            epoch, network, optimizer,
            train_loss=train_loss, train_acc=train_acc, val_loss=val_loss, val_acc=val_acc,
        )  # fmt: skip


def _graph(step, indices: Tensor):  # type: ignore[no-untyped-def]
    """Record a step as a CUDA graph; return a function that replays it for other indices."""
    inputs = indices[:BATCH_SIZE].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first step allocates must not become a part of it
        for _ in range(3):
            step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(inputs)

    def replay(indices: Tensor) -> None:
        inputs.copy_(indices)
        graph.replay()

    return replay


if __name__ == "__main__":
    sys.argv.remove(way := sys.argv[1])
    main(is_best=way == "best")
