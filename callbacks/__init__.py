"""What watches a run and never changes its outcome."""

from callbacks.history import History
from callbacks.layer_table import LayerTable
from callbacks.progress import ImagesBar

__all__ = ["History", "ImagesBar", "LayerTable"]
