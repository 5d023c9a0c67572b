"""Metrics for samples, and the feature extractors that they use."""

from halfstep.metrics.catalogue import METRICS, Figures, figures_of, figures_of_halves, paired_figures
from halfstep.metrics.classifier import CLASSIFIER, LEAST, Classifier, check_classes, train_classifier
from halfstep.metrics.dinov2 import DINOv2
from halfstep.metrics.distances import (
    Moments,
    frechet_distance,
    frechet_of_moments,
    kernel_distance,
    moments_of,
    sliced_wasserstein,
)
from halfstep.metrics.features import FeatureExtractor, Pixels, RealData, extractor_for, extractors
from halfstep.metrics.images import from_uint8, to_uint8
from halfstep.metrics.inception import Inception
from halfstep.metrics.neighbours import PRDC, precision_recall
from halfstep.metrics.paired import lpips, psnr, rmse, ssim, why_no_lpips
from halfstep.metrics.reference import RealFeatures, real_features
from halfstep.metrics.resnet20 import ResNet20Features
from halfstep.metrics.scores import inception_score
