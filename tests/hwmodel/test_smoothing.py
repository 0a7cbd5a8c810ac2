"""The differentiable surrogate: zero work and infinite bandwidth cost what the exact model says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import resnet18

from stp_jax import hwmodel
from stp_jax.hwmodel.smoothing import smooth_maximum, smooth_minimum

NETWORK = hwmodel.Network((hwmodel.dense("a", 64, 10, rows=5), hwmodel.dense("b", 20, 30)))
ARRAY = hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE(group_size=8))


def test_weights_without_terms_take_no_energy():
    weights = {"a": np.zeros((64, 10), np.int8), "b": np.zeros((20, 30), np.int8)}
    report = hwmodel.evaluate(NETWORK, ARRAY, budgets=8.0, weights=weights, smoothing=0.05)
    assert (report.energy_pj["array"] == 0).all()


def test_nothing_stalls_at_infinite_bandwidth():
    smooth = hwmodel.evaluate(NETWORK, ARRAY, budgets=8, smoothing=0.05)
    assert (smooth.stall_cycles == 0).all()
    gradient = jax.grad(
        lambda k: hwmodel.evaluate(NETWORK, ARRAY, budgets=k, smoothing=0.05).stall_cycles.sum()
    )(8.0)
    assert abs(gradient) < 1e-4  # of compute cycles, whose derivative is some hundreds


@pytest.mark.parametrize("smoothing", [-1, 1, 1.5, float("nan"), float("inf")])
def test_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match="smoothing must be from 0 to below 1"):
        hwmodel.evaluate(NETWORK, ARRAY, budgets=8, smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [True, None, "0.1"])
def test_smoothing_that_is_no_number_is_refused(smoothing):
    with pytest.raises(TypeError, match="smoothing must be a number"):
        hwmodel.evaluate(NETWORK, ARRAY, budgets=8, smoothing=smoothing)


@pytest.mark.parametrize("budget", [-1.0, 32.5, float("nan"), float("inf")])
def test_relaxed_budgets_out_of_range_are_refused(budget):
    hwmodel.evaluate(NETWORK, ARRAY, budgets=2.5, smoothing=0.05)
    with pytest.raises(ValueError, match="a: a budget must be a number from 0 to 32"):
        hwmodel.evaluate(NETWORK, ARRAY, budgets=budget, smoothing=0.05)


@pytest.mark.parametrize("smoothing", [0.01, 0.3, 0.99])
def test_smooth_extrema_stay_near_and_between(smoothing):
    a, b = np.meshgrid(np.linspace(0, 5, 21), np.linspace(0, 5, 21))
    largest, least = (f(a, b, smoothing) for f in (smooth_maximum, smooth_minimum))
    assert (largest >= np.maximum(a, b) - 1e-12).all()
    assert (largest <= np.maximum(a, b) + smoothing / 2 * (a + b) + 1e-12).all()
    assert (least >= -1e-12).all()
    assert (least <= np.minimum(a, b) + 1e-12).all()
    zero = a * b == 0
    np.testing.assert_array_equal(largest[zero], np.maximum(a, b)[zero])
    slope = jax.grad(lambda x: smooth_maximum(x, jnp.float32(0), smoothing))(jnp.float32(0))
    assert np.isfinite(slope)


RESNET18 = resnet18()


def relaxed(smoothing, packed=True):
    pe = hwmodel.GroupPE(group_size=8, packed=packed)
    array = hwmodel.Array(rows=32, cols=32, pe=pe, dram_bandwidth=16.0)

    def cost(budgets):
        report = hwmodel.evaluate(RESNET18, array, budgets=budgets, smoothing=smoothing)
        return report.total_cycles, report.total_energy_pj

    return cost


# Not 8: there the 3x3x512x512 kernels fill half of their buffer to 98 %, on the smoothed step.
@pytest.mark.parametrize("k", [4, 9, 13])
def test_the_surrogate_is_within_its_smoothing_of_the_exact_model(k):
    exact, smooth = (relaxed(s)(np.full(len(RESNET18), k)) for s in (0.0, 0.01))
    np.testing.assert_allclose(smooth, exact, rtol=0.02)


@pytest.mark.parametrize("component", [0, 1])
def test_surrogate_gradients_are_its_differences(component):
    budgets = np.linspace(3.0, 14.0, len(RESNET18))
    cost = relaxed(0.05)
    gradient = jax.grad(lambda k: cost(k)[component])(jnp.asarray(budgets, jnp.float32))
    for i in (0, 7, 20):
        step = np.zeros(len(RESNET18))
        step[i] = 1e-4
        difference = (cost(budgets + step)[component] - cost(budgets - step)[component]) / 2e-4
        np.testing.assert_allclose(gradient[i], difference, rtol=1e-3)
    assert (gradient > 0).all()
