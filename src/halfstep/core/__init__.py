"""The mathematics, in torch alone: no files and no third-party networks."""
