"""Features in, float out: distances between sets of samples, and what they are measured in."""

from halfstep.metrics.distances import frechet_distance, kernel_distance, rmse
from halfstep.metrics.features import Classifier, FeatureExtractor, Pixels, train_classifier

__all__ = [
    "Classifier",
    "FeatureExtractor",
    "Pixels",
    "frechet_distance",
    "kernel_distance",
    "rmse",
    "train_classifier",
]
