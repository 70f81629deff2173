"""The shapes and sizes that the report gives."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from networks import ConvNet, MaxPool2x2, SpeedrunNet, has_large_stem, library_network


def test_output_shapes_of_every_part_are_those_of_the_report() -> None:
    network = ConvNet()
    shapes = {}
    for name, module in network.named_children():
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: shapes.update({name: list(output.shape)})
        )
    logits = network(torch.rand(128, 3, 32, 32))
    assert shapes == {
        "conv1": [128, 6, 16, 16],
        "conv2": [128, 16, 8, 8],
        "conv3": [128, 32, 4, 4],
        "flatten": [128, 512],
        "dense1": [128, 120],
        "dense2": [128, 84],
        "dense3": [128, 10],
    }
    assert not torch.allclose(logits.sum(dim=1), torch.ones(128)), "logits, not probabilities"


@pytest.mark.parametrize(("dense_units", "parameters"), [(84, 78_658), (80, 78_134)])
def test_parameter_count(dense_units: int, parameters: int) -> None:
    assert sum(p.numel() for p in ConvNet(dense_units).parameters()) == parameters


@pytest.mark.parametrize("size", [32, 28, 27])
def test_the_speedrun_network_leaves_out_only_what_pooling_drops(size: int) -> None:
    network, images = SpeedrunNet((8, 8, 8), residual=True), torch.rand(2, 3, size, size + 2)
    sides: list[int] = []
    stage: Any
    for stage in network.groups:
        conv = stage.get_submodule("conv1")
        conv.register_forward_hook(lambda _module, _inputs, output: sides.extend(output.shape[2:]))
    found = network(images)
    assert not any(side % 2 for side in sides)

    x = F.gelu(network.whiten(images))
    for stage in network.groups:
        whole = F.conv2d(x, stage.conv1.weight, padding=1)
        x = F.gelu(stage.norm1(F.max_pool2d(whole, 2)))
        y = F.gelu(stage.norm2(stage.conv2(x)))
        x = F.gelu(stage.norm3(stage.conv3(y)) + x)
    torch.testing.assert_close(found, network.head(x.amax((2, 3))))


def test_width_multiplies_the_channels_and_dropout_drops_in_training_only() -> None:
    wide = ConvNet(width=2).state_dict()
    assert [wide[f"conv{i}.0.weight"].shape[0] for i in (1, 2, 3)] == [12, 32, 64]
    network, images = ConvNet(dropout=0.5), torch.rand(4, 3, 32, 32)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))


def test_first_convolution_reflects_at_the_border() -> None:
    conv = ConvNet().conv1[0]
    assert isinstance(conv, torch.nn.Conv2d)
    image = torch.rand(1, 3, 32, 32)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="reflect")
    expected = torch.nn.functional.conv2d(padded, conv.weight, conv.bias)
    torch.testing.assert_close(conv(image), expected)


@pytest.mark.parametrize("shape", [(4, 6, 32, 32), (1, 16, 4, 2), (2, 3, 7, 6), (0, 6, 8, 8)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_max_pooling_is_pytorchs(
    shape: tuple[int, int, int, int], memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    # Distinct numbers, because any of several equal ones may get the gradient.
    images = torch.randperm(math.prod(shape)).view(shape).float() - 1000
    images = images.to(memory_format=memory_format)
    results = []
    for pool in (MaxPool2x2(), torch.nn.MaxPool2d(2)):
        leaf = images.clone().requires_grad_()
        pooled = pool(leaf)
        pooled.backward(torch.rand(pooled.shape, generator=torch.Generator().manual_seed(0)))
        assert leaf.grad is not None
        results.append((pooled.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_gradient_of_max_pooling_goes_to_one_of_equal_numbers() -> None:
    images = torch.zeros(1, 1, 2, 2, requires_grad=True)
    MaxPool2x2()(images).sum().backward()
    assert images.grad is not None
    assert sorted(images.grad.flatten().tolist()) == [0, 0, 0, 1]


def test_a_number_that_is_none_is_not_hidden_by_max_pooling() -> None:
    images = torch.tensor([[[[1.0, float("nan")], [2.0, 3.0]]]])
    assert MaxPool2x2()(images).isnan().all()
    assert F.max_pool2d(images, 2).isnan().all()


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "timm/resnet18d"])
def test_resnets_of_libraries_see_small_images_whole(name: str) -> None:
    shapes: list[torch.Size] = []
    for stem, size in (("small", 32), ("own", 8)):
        network: Any = library_network(name, stem)  # type: ignore[arg-type]
        network.layer1.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
        assert network.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        assert shapes.pop() == (2, 64, size, size)
        assert has_large_stem(network) == (stem == "own")


def test_other_networks_of_libraries_take_arguments() -> None:
    arguments = {"img_size": 32, "patch_size": 8, "depth": 1}
    network = library_network("timm/vit_tiny_patch16_224", arguments=arguments)
    assert network.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert library_network("googlenet")(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="num_classes"):
        library_network("resnet18", arguments={"num_classes": 3})
    for name in ("resnet19", "timm/resnet19"):
        with pytest.raises(ValueError, match=f"no network {name}: did you mean {name[:-1]}"):
            library_network(name)
