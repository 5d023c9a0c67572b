"""Operating system services: atomic files, signals, several processes, out-of-memory errors."""
