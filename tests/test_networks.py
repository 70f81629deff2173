"""The shapes and sizes that the report gives."""

import pytest
import torch

from networks import ConvNet


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


def test_first_convolution_reflects_at_the_border() -> None:
    conv = ConvNet().conv1[0]
    assert isinstance(conv, torch.nn.Conv2d)
    image = torch.rand(1, 3, 32, 32)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="reflect")
    expected = torch.nn.functional.conv2d(padded, conv.weight, conv.bias)
    torch.testing.assert_close(conv(image), expected)
