"""Temperature scaling: probabilities from a network's logits that can be trusted."""

import math
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from cifar10.batches import Predictions, gathered
from runs import differences, read_checkpoint, settings_of

UNSURE = 0.05  # share of validation images below `unsure_below`
UNKNOWN = (
    "has no temperature: it was not validated before saving, was right on every validation image, "
    "or is from an earlier version"
)
# Hyperparameters that affect a model's temperature.
CALIBRATED = ("network", "normalize", "label_smoothing", "class_weights", "softmax_before_loss")


def is_file(calibrate: bool | str) -> bool:
    """Return whether `model.calibrate` names a checkpoint file."""
    return calibrate not in ("auto", True, False)


class Calibration:
    """A model's temperature, fitted on its validation set or read from another checkpoint.

    Args:
        source: A checkpoint file, whose temperature is used. Otherwise each validation during `fit`
            fits one.

    Raises:
        MisconfigurationException: The file has no temperature.

    """

    def __init__(self, source: bool | str) -> None:
        self.temperature: float | None = None
        self.unsure_below = 0.0  # a largest probability below it is "not sure"
        self.is_fitted = not is_file(source)
        self.fitted_on: dict[str, Tensor] = {}  # weights that the temperature belongs to
        self.batches: list[Predictions] | None = None  # of the validation that runs
        if not self.is_fitted:
            checkpoint = read_checkpoint(str(source))
            if checkpoint.get("temperature") is None:
                raise MisconfigurationException(f"model.calibrate: {source} {UNKNOWN}")
            self.temperature = checkpoint["temperature"]
            self.unsure_below = checkpoint["unsure_below"]

    def begin(self, weights: dict[str, Tensor] | None) -> None:
        """Start to collect a validation's predictions, made with these weights; None: ignore it."""
        self.batches = None
        if self.is_fitted and weights is not None:
            # Copied now: callbacks may swap the weights during validation.
            self.validating, self.batches = _of_network(weights), []

    def add(self, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Add a batch: logits [B, classes], labels and indices int64 [B]."""
        if self.batches is not None:
            self.batches.append(Predictions(logits.float(), labels, indices))

    def end(self) -> None:
        """Fit the temperature on the predictions collected on all ranks."""
        batches, self.batches = self.batches, None
        if batches is None or (predictions := gathered(batches)) is None:
            return
        self.fitted_on, self.temperature = self.validating, None
        logits, labels, _ = predictions
        if (logits.argmax(dim=1) == labels).all():
            return  # the best temperature would be 0, and every probability 1
        self.temperature = fit_temperature(logits, labels)
        largest = (logits / self.temperature).softmax(dim=1).max(dim=1).values
        self.unsure_below = float(largest.quantile(UNSURE))

    def temperature_of(self, weights: dict[str, Tensor]) -> float | None:
        """Return the temperature if it belongs to these weights or comes from a file."""
        current, fitted_on = _of_network(weights), self.fitted_on
        is_same = current.keys() == fitted_on.keys() and all(
            torch.equal(weight, fitted_on[name].to(weight.dtype))
            for name, weight in current.items()
        )  # an exported checkpoint may have 16-bit weights
        return self.temperature if is_same or not self.is_fitted else None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Save the temperature, if it belongs to the weights in a checkpoint."""
        checkpoint["temperature"] = self.temperature_of(checkpoint["state_dict"])
        checkpoint["unsure_below"] = self.unsure_below

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Restore the temperature of a checkpoint, unless another file's is used."""
        if self.is_fitted or self.temperature is None:
            self.temperature = checkpoint.get("temperature")
            self.fitted_on = _of_network(checkpoint["state_dict"])
            self.unsure_below = checkpoint.get("unsure_below", 0.0)


def _of_network(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return CPU copies of the network's weights in a module's state dict."""
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in weights.items()
        if name.startswith("network.")
    }


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T, from e^-3 to e^3, that minimises the cross entropy of logits
    [N, classes] / T with labels int64 [N].

    Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599, section 4.2).
    """
    from scipy.optimize import minimize_scalar  # slow to import

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits.double() / math.exp(log_temperature), labels))

    return math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)


def notes_on(file: str, settings: dict[str, Any]) -> list[str]:
    """List how the run that `file` comes from differs from `settings` in ways that affect
    calibration. Raise if the networks differ."""
    configs = settings_of(read_checkpoint(file)), settings
    saved, current = ({key: config["model"].get(key) for key in CALIBRATED} for config in configs)
    changed = differences(saved, current)
    networks = {*changed.get("network.class_path", ())}  # both classes, if they differ
    if networks and not networks & {None, "networks.default_network"}:
        raise MisconfigurationException(
            f"model.calibrate {file} has another network ({' and '.join(sorted(networks))}): "
            "use a run of the same recipe"
        )
    notes = [f"with {key} {old}, not {new}" for key, (old, new) in changed.items()]
    if len({str(config["model"].get("classes")) for config in configs}) > 1:
        notes.append("on images of other classes")
    return [f"model.calibrate {file} was trained {difference}" for difference in notes]
