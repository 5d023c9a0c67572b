"""Import diffusers pipelines and the paper authors' checkpoints; export models as pipelines, ONNX or web pages."""

from halfstep.hub.autoencoder import Autoencoder
from halfstep.hub.disk import networks_below
from halfstep.hub.encoding import autoencoder_of, decoder_of, encoder_of, prompts_of, release_texts, text_conditions
from halfstep.hub.export import export_lora, export_pipeline, push_to_hub
from halfstep.hub.google_pd import CONFIGS, GooglePDConfig, config_of, import_google_pd
from halfstep.hub.onnx import export_onnx
from halfstep.hub.pipelines import PIXELS, START_STEPS, fetch, import_pipeline, is_pipeline, read_kind
from halfstep.hub.published import PUBLISHED, published
from halfstep.hub.schedulers import read_schedule, write_schedule
from halfstep.hub.web import export_web
