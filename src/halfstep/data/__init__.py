"""Training data sources and batches. Only this package imports `datasets`."""

from halfstep.data.base import Data, MemoryData, held_on, sent, training_batch, warn_of_scale
from halfstep.data.captions import CaptionedImages, Prompts, read_captions, read_classes, read_prompts
from halfstep.data.clips import CaptionedClips, SoundPreparation, VideoPreparation, read_clips
from halfstep.data.config import DataConfig, holds_images, open_data
from halfstep.data.encoding import Encoder, encode
from halfstep.data.folders import changed_since
from halfstep.data.forecast import Forecast, forecast
from halfstep.data.images import ImageFiles
from halfstep.data.latents import LATENTS, LatentData, open_latents
from halfstep.data.standin import StandIn
