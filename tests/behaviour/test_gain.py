"""A network whose first step amplifies its error beyond use gets a warning: eps at zero SNR, and no other."""

import math
import warnings

import pytest
import torch

from halfstep.core.denoiser import NetworkDenoiser, output_gain, warn_of_gain
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import X0, Both, Eps, Prediction, V
from halfstep.core.warnings import HalfstepWarning
from halfstep.objectives import Training
from halfstep.recipes import build, recipes
from halfstep.run.distill import distill
from support import clock, numbers, toy_denoiser


@pytest.mark.parametrize("prediction", [X0(), Eps(), V(), Both()])
@pytest.mark.parametrize("t", [0.2, 0.7, 1.0])
def test_the_gain_is_the_error_of_x0_for_an_error_of_the_output(prediction: Prediction, t: float) -> None:
    process = VPCosine()
    denoiser, x_t = toy_denoiser(process, prediction), numbers(3, 2)
    shift = 1e-3
    shifted = NetworkDenoiser(lambda x, time: denoiser.network(x, time) + shift, process, prediction)
    error = (shifted(x_t, t).x0 - denoiser(x_t, t).x0).abs() / shift
    torch.testing.assert_close(error, torch.full_like(error, output_gain(process, prediction, t)), rtol=1e-6, atol=1e-9)


def test_prediction_of_eps_from_zero_snr_warns_why_and_what_to_do() -> None:
    with pytest.warns(HalfstepWarning, match=r"predicts eps, and at t = 1, .* -20, .*predict x0, v or both"):
        warn_of_gain(VPCosine(), Eps())
    gain = float(torch.div(*reversed(VPCosine().alpha_sigma(clock(1.0)))))
    assert output_gain(VPCosine(), Eps()) == pytest.approx(gain) == pytest.approx(math.exp(10), rel=1e-6)


@pytest.mark.parametrize(
    ("process", "prediction"),
    [(VPCosine(), X0()), (VPCosine(), V()), (VPCosine(), Both()), (VPCosine(log_snr_min=-8), Eps())],
)
def test_no_other_network_warns(process: VPCosine, prediction: Prediction) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_gain(process, prediction)


def test_distillation_in_memory_and_by_recipe_warn_but_training_an_eps_teacher_does_not() -> None:
    teacher = toy_denoiser(VPCosine(), Eps())
    teacher.network.to(torch.float32)
    training = Training(1, 2e-4, batch_size=4)
    with pytest.warns(HalfstepWarning, match="predicts eps"):
        distill(teacher, numbers(16, 2).float(), start=2, to=1, training=training, prediction=Eps())
    # By default, a chain first matches such a teacher to v.
    assert distill(teacher, numbers(16, 2).float(), start=2, to=1, training=training).prediction == V()
    recipe = recipes["digits"]()
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"prediction": "eps"})})
    with pytest.warns(HalfstepWarning, match="predicts eps"):
        build(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(recipe, what="teacher")
