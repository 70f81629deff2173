"""What watches a run and never changes its outcome."""

from callbacks.history import History
from callbacks.layer_table import LayerTable
from callbacks.predictions import ConfusionMatrix, PredictionsKeeper
from callbacks.progress import ImagesBar

__all__ = ["ConfusionMatrix", "History", "ImagesBar", "LayerTable", "PredictionsKeeper"]
