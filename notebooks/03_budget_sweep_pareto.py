# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Budget sweep: the Pareto front of accuracy and energy
#
# One small network on handwritten digits, trained once in float. For each total of terms it is
# projected and retrained twice: with the same budget in every layer, and with budgets by layer from
# measured sensitivity. Each point is (array energy per image, top-1 on the test images).
#
# Digits are an easy task and the steps are few: the figure shows how to make such a sweep, not what
# the method is worth. Full-size comparisons belong to `experiments`.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
from flax import nnx

import stp_jax
from stp_jax import data, terms

digits = data.load("digits")
(test,) = data.eval_batches(digits, batch_size=360)


# %%
class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.conv3 = nnx.Conv(16, 16, (3, 3), strides=2, rngs=rngs)
        self.conv4 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.conv5 = nnx.Conv(32, 32, (3, 3), strides=2, rngs=rngs)
        self.fc = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            x = nnx.relu(layer(x))
        return self.fc(x.mean(axis=(1, 2)))


def loss(model, batch):
    logits = model(batch["input"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


@nnx.jit
def train_step(model, optimizer, batch):
    optimizer.update(model, nnx.grad(loss)(model, batch))


def optimizer_for(steps, lr):
    return optax.sgd(optax.cosine_decay_schedule(lr, steps), momentum=0.9, nesterov=True)


def train(model, tx, *, steps):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    batches = data.train_iterator(digits, batch_size=64, seed=0)
    for _ in range(steps):
        train_step(model, optimizer, next(batches))


@nnx.jit
def predict(model, image):
    return model(image).argmax(axis=-1)


def top1(model):
    return 100 * float((predict(model, test["input"]) == test["label"]).mean())


model = Net(nnx.Rngs(0))
train(model, optimizer_for(200, lr=0.1), steps=200)
float_top1 = top1(model)
print(f"float: top-1 {float_top1:.1f} %")

# %% [markdown]
# ## An STP model that holds every term
#
# It is the start of every point: int8 inputs and weights, calibrated, nothing pruned yet.

# %%
policy = stp_jax.Policy(
    [stp_jax.Rule(path="conv1|fc"), stp_jax.Rule(path=".*", budget=32, group_size=8)]
)
start = stp_jax.quantize(model, policy)
batches = data.train_iterator(digits, batch_size=64, seed=1)
examples = [next(batches) for _ in range(4)]
stp_jax.calibrate(start, [batch["input"] for batch in examples])

layers = list(stp_jax.budgets(start))
groups = stp_jax.group_counts(start)
curves = stp_jax.error_curves(start, importance=stp_jax.squared_gradients(start, loss, examples))

fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name in layers:
    ax.semilogy(np.arange(33) / 8, np.maximum(curves[name], 1e-9), label=name)
ax.set(
    xlabel="budget (terms per weight)",
    ylabel="error weighted by squared gradients",
    title="what each layer loses",
)
ax.legend()
plt.show()

# %% [markdown]
# ## The accelerator's side
#
# A 16×16 input-stationary array at 45 nm. Array energy is that of shifts and additions, or of
# multiplications and additions for the int8 baseline; memory is the same for all and left out here.


# %%
def energy_nj(report):
    return 1e-3 * report.energy_pj["array"].sum()


def cost(model):
    return stp_jax.evaluate_model(model, jnp.zeros((1, 8, 8, 1)), rows=16, cols=16)


baseline = cost(start).baseline


# %% [markdown]
# ## The sweep
#
# Budgets are values in the model, so that all points share one compiled step. A term in a layer
# that is used at many positions costs more energy; the allocation pays by use.

# %%
costs = stp_jax.term_costs(start, jnp.zeros((1, 8, 8, 1)), per="energy")


def allocated(mean):
    return terms.allocate_budgets({name: curves[name] for name in layers}, costs, mean)


retraining = optimizer_for(60, lr=0.02)  # the same object in every run, so one compiled step
rows = []
for mean in (0.25, 0.375, 0.5, 0.75, 1.0, 1.5):
    choices = {"uniform": dict.fromkeys(layers, int(8 * mean)), "by layer": allocated(mean)}
    for choice, budgets in choices.items():
        stp = nnx.clone(start)
        stp_jax.set_budgets(stp, budgets)
        stp_jax.search_weight_scales(stp)
        projected = top1(stp)
        train(stp, retraining, steps=60)
        report = cost(stp).report
        rows.append(
            {
                "budgets": choice,
                "terms per weight": mean,
                "projected top-1 (%)": projected,
                "retrained top-1 (%)": top1(stp),
                "array energy (nJ)": energy_nj(report),
                "cycles": int(report.total_cycles),
                **{f"k {name}": budgets[name] for name in layers},
            }
        )
points = pd.DataFrame(rows)
points.round(2)

# %%
fig, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
markers = {"uniform": "o", "by layer": "s"}
for (choice, table), color in zip(points.groupby("budgets"), ("C0", "C1"), strict=True):
    x = table["array energy (nJ)"]
    marker = markers[choice]
    ax.plot(
        x, table["retrained top-1 (%)"], marker + "-", color=color, label=f"{choice}, retrained"
    )
    ax.plot(
        x,
        table["projected top-1 (%)"],
        marker + ":",
        color=color,
        mfc="w",
        label=f"{choice}, projected",
    )

accuracy = points[["projected top-1 (%)", "retrained top-1 (%)"]].max(axis=1)
best = points.assign(top1=accuracy).sort_values("array energy (nJ)")
front = best[best["top1"] > best["top1"].cummax().shift(fill_value=0)]
ax.step(
    front["array energy (nJ)"],
    front["top1"],
    where="post",
    color="black",
    lw=1,
    label="Pareto front",
)
ax.axhline(float_top1, color="0.5", lw=1, label="float")
ax.axvline(energy_nj(baseline), color="0.5", ls="--", lw=1, label="int8 multiply-accumulate array")
ax.set(xlabel="array energy per image (nJ, 45 nm)", ylabel="top-1 on 360 test images (%)")
ax.legend(fontsize=8)
ax.grid(alpha=0.3)
plt.show()

# %% [markdown]
# One test image is 0.28 points, so that small differences between points mean nothing here.
