"""What watches a run and never changes it."""

from callbacks.history import History
from callbacks.layer_table import LayerTable

__all__ = ["History", "LayerTable"]
