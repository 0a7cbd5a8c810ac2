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
# # From a float model to an STP model, in ten lines
#
# The model below is an ordinary Flax NNX module, trained by an ordinary loop: neither knows of
# terms. The data are scikit-learn's handwritten digits, 8×8 pixels, which come with the package.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import stp_jax
from stp_jax import data, hwmodel, terms

digits = data.load("digits")
(test,) = data.eval_batches(digits, batch_size=360)
print(digits.description)


# %%
class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.conv3 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.fc = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        for layer in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(layer(x))
        return self.fc(x.mean(axis=(1, 2)))


def loss(model, batch):
    logits = model(batch["input"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


@nnx.jit
def train_step(model, optimizer, batch):
    optimizer.update(model, nnx.grad(loss)(model, batch))


def train(model, *, steps, lr):
    tx = optax.sgd(optax.cosine_decay_schedule(lr, steps), momentum=0.9, nesterov=True)
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
train(model, steps=150, lr=0.1)
accuracy = {"float": top1(model)}

# %% [markdown]
# ## The ten lines
#
# The first and the last layer keep every term of int8; all others keep half a term per weight:
# 4 terms in each group of 8 input channels.

# %%
policy = stp_jax.Policy(
    [stp_jax.Rule(path="conv1|fc"), stp_jax.Rule(path=".*", budget=4, group_size=8)]
)
stp = stp_jax.quantize(model, policy)
stp_jax.calibrate(stp, [next(data.train_iterator(digits, batch_size=256, seed=1))["input"]])
accuracy["projected"] = top1(stp)
train(stp, steps=60, lr=0.01)  # the same loop: gradients pass straight through the projection
accuracy["retrained"] = top1(stp)
integers = stp_jax.integer_model(stp, arithmetic="shift_add")
accuracy["shift and add"] = top1(integers)

# %%
fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
ax.bar_label(ax.bar(list(accuracy), list(accuracy.values())), fmt="%.1f")
ax.set(ylabel="top-1 on 360 test images (%)", ylim=(min(accuracy.values()) - 5, 101))
plt.show()

# %% [markdown]
# ## What the weights became
#
# Integers of few terms. The budget holds for groups, so single weights may have several terms while
# their neighbours have none.

# %%
weights = stp_jax.integer_weights(stp)
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
left.hist(weights["conv3"].ravel(), bins=np.arange(-128, 129) - 0.5)
left.set(xlabel="weight of conv3 (integer units)", ylabel="number of weights", yscale="log")
for offset, (name, v) in enumerate(weights.items()):
    shares = np.bincount(np.asarray(terms.count(v)).ravel(), minlength=5) / v.size
    right.bar(np.arange(5) + 0.2 * (offset - 1.5), 100 * shares, width=0.2, label=name)
right.set(xlabel="terms of a weight", ylabel="share of the layer's weights (%)")
right.legend()
plt.show()

# %% [markdown]
# ## What it costs
#
# Layer shapes are traced from the model, terms are counted in its trained integers.

# %%
cost = stp_jax.evaluate_model(stp, jnp.zeros((1, 8, 8, 1)), rows=16, cols=16)
reports = {"int8 multiply-accumulate": cost.baseline, "group PE": cost.report}
saving = cost.saving
fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
hwmodel.plot_energy(ax, reports, components=("array", "encoder", "registers", "sram"))
ax.set_title(f"energy per image, 45 nm; array energy {saving:.2f} times lower")
plt.show()

# %% [markdown]
# ## The same for Linen
#
# `quantize` takes Linen modules too. The user's `params` stay as they are; what the quantizers keep
# stands in collections of its own.

# %%
from flax import linen as nn


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features, strides in ((16, 1), (32, 2), (64, 2)):
            x = nn.relu(nn.Conv(features, (3, 3), strides=strides)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


policy = stp_jax.Policy(
    [stp_jax.Rule(path="Conv_0|Dense_0"), stp_jax.Rule(path=".*", budget=4, group_size=8)]
)
linen = stp_jax.quantize(LinenNet(), policy)
batches = data.train_iterator(digits, batch_size=64, seed=0)
variables = linen.init(jax.random.key(0), next(batches)["input"])
print(sorted(variables), linen.budgets(variables))

# %% [markdown]
# It trains as the module itself would, the learned scales (`stp_params`) with the parameters.

# %%
tx = optax.sgd(optax.cosine_decay_schedule(0.1, 150), momentum=0.9, nesterov=True)
trained = {name: variables.pop(name) for name in ("params", "stp_params")}
opt_state = tx.init(trained)


@jax.jit
def linen_step(trained, opt_state, batch):
    def loss(trained):
        logits = linen.apply(trained | variables, batch["input"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    updates, opt_state = tx.update(jax.grad(loss)(trained), opt_state)
    return optax.apply_updates(trained, updates), opt_state


for _ in range(150):
    trained, opt_state = linen_step(trained, opt_state, next(batches))
found = linen.calibrate(trained | variables, [next(batches)["input"]])
hits = linen.apply(found, test["input"]).argmax(axis=-1) == test["label"]
print(f"top-1 {100 * hits.mean():.1f} % at {4 / 8} terms per weight")
