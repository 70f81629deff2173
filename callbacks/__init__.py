"""What watches a run and never changes its outcome."""

from callbacks.board import Board
from callbacks.history import History
from callbacks.layer_table import LayerTable
from callbacks.predictions import ConfusionMatrix, PredictionsKeeper, PredictionTable
from callbacks.progress import ImagesBar

__all__ = [
    "Board",
    "ConfusionMatrix", "History", "ImagesBar", "LayerTable", "PredictionTable", "PredictionsKeeper",
]  # fmt: skip
