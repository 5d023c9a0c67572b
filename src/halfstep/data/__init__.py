"""Data: where clean samples come from, as batches of x0 in [-1, 1] (images) or as they are (anything else)."""

from halfstep.data.base import Data, MemoryData, training_batch
from halfstep.data.config import DataConfig, open_data
from halfstep.data.images import ImageFiles

__all__ = ["Data", "DataConfig", "ImageFiles", "MemoryData", "open_data", "training_batch"]
