"""Export a model as a web page that samples in the browser."""

from halfstep.hub.web.page import export_web
