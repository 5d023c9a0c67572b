"""The border with other libraries' files: imports here; exports come with a later issue."""

from halfstep.hub.google_pd import CONFIGS, GooglePDConfig, config_of, import_google_pd

__all__ = ["CONFIGS", "GooglePDConfig", "config_of", "import_google_pd"]
