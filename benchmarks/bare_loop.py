"""(c) A bare loop on tensors in memory, with the network and the optimizer of base.yaml; (d) the
best that was found: on a CPU the memory of freed tensors is kept (compiling gains nothing, see
docs/speed.md), on a GPU a step is compiled and one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import BATCH_SIZE, NETWORKS, Marks, image_sets, parsed
from datamodule import EVAL_BATCH_SIZES
from train import keep_freed_memory

Step = Callable[[Tensor], None]


def main() -> None:
    """Train until the process is stopped."""
    args = parsed()
    if args.best:
        keep_freed_memory()
    torch.manual_seed(0)
    sets = image_sets(args.root, args.val_size, not args.unverified)
    train_set, val_set = (images.to(args.device) for images in sets)
    network = NETWORKS[args.network]().to(args.device)
    is_graph = args.best and args.device == "cuda"
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-4, fused=True, capturable=is_graph)
    totals = torch.zeros(2, device=args.device)  # loss and right predictions
    marks = Marks(args.folder)

    def loss_of(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(pixels / 255)
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()

    def step_with(loss_of: Callable[..., tuple[Tensor, Tensor]]) -> Step:
        def step(indices: Tensor) -> None:
            batch = train_set.batch(indices)
            loss, correct = loss_of(batch.images, batch.labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            totals[0].add_(loss.detach(), alpha=len(indices))
            totals[1].add_(correct)

        return step

    step = tail_step = step_with(loss_of)
    if is_graph:
        compiled_step = step_with(torch.compile(loss_of, dynamic=False))
        step = _graph(compiled_step, train_set.indices[:BATCH_SIZE])

    for epoch in range(args.epochs):
        network.train()
        totals.zero_()
        order = train_set.indices[torch.randperm(len(train_set)).to(args.device)]
        for indices in torch.split(order, BATCH_SIZE):
            (step if len(indices) == BATCH_SIZE else tail_step)(indices)
        train_loss, train_acc = (totals / len(train_set)).tolist()

        network.eval()
        totals.zero_()
        with torch.inference_mode():
            for indices in torch.split(val_set.indices, EVAL_BATCH_SIZES[args.device]):
                batch = val_set.batch(indices)
                loss, correct = loss_of(batch.images, batch.labels)
                totals[0].add_(loss, alpha=len(indices))
                totals[1].add_(correct)
        val_loss, val_acc = (totals / len(val_set)).tolist()
        marks.leave(
            epoch, network, optimizer,
            train_loss=train_loss, train_acc=train_acc, val_loss=val_loss, val_acc=val_acc,
        )  # fmt: skip


def _graph(step: Step, indices: Tensor) -> Step:
    """Record a step as a CUDA graph; return a function that replays it for other indices."""
    inputs = indices.clone()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
    main()
