"""Training data: where they come from, and the batch of an update. The only room that imports `datasets`."""

from halfstep.data.base import Data, MemoryData, training_batch
from halfstep.data.config import DataConfig, open_data
from halfstep.data.images import ImageFiles
from halfstep.data.standin import StandIn

__all__ = ["Data", "DataConfig", "ImageFiles", "MemoryData", "StandIn", "open_data", "training_batch"]
