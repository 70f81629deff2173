"""Callbacks that observe a run. On resume, `SaveSettings` also resets a changed optimizer."""

from callbacks.history import History
from callbacks.predictions import ConfusionMatrix, PredictionsKeeper, PredictionTable
from callbacks.settings import SaveSettings
from callbacks.tensorboard import Board, LayerTable

__all__ = [
    "Board",
    "ConfusionMatrix", "History", "LayerTable", "PredictionTable", "PredictionsKeeper",
    "SaveSettings",
]  # fmt: skip
