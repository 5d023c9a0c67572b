"""The mathematics, written in torch alone, without files or third-party networks."""
