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
# # Terms and encodings, seen
#
# A **term** is ±2^e. An encoding writes an integer as a sum of terms; the fewer, the less work for
# a processing element that adds one term a cycle. This notebook shows the four encodings, what
# they cost, and what happens when a group of weights may keep only k terms.

# %%
import matplotlib.pyplot as plt
import numpy as np

from stp_jax import terms

# %% [markdown]
# ## One number, four ways

# %%
value = 119
for encoding in terms.ENCODINGS:
    digits = np.asarray(terms.encode(value, encoding))
    shown = " ".join(
        f"{'+' if digit > 0 else '−'}2^{exponent}"
        for exponent, digit in reversed(list(enumerate(digits)))
        if digit
    )
    print(f"{encoding:7} {np.abs(digits).sum()} terms: {shown}")

# %% [markdown]
# ## All digits of all bytes
#
# Red is +1, blue −1. The non-adjacent form (NAF) never has two digits side by side.

# %%
fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), sharey=True, layout="constrained")
values = np.arange(256)
for ax, encoding in zip(axes, terms.ENCODINGS, strict=True):
    digits = np.asarray(terms.encode(values, encoding))
    image = ax.imshow(
        digits, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest"
    )
    mean = np.abs(digits).sum(axis=1).mean()
    ax.set(title=f"{encoding}, mean {mean:.3f} terms", xlabel="exponent e of 2^e")
axes[0].set_ylabel("value")
fig.colorbar(image, ax=axes, label="digit", ticks=[-1, 0, 1])
plt.show()

# %% [markdown]
# ## How many terms weights need
#
# Trained weights are closer to normal than to uniform. Here: a normal variable whose standard
# deviation is 127/4, rounded to int8.

# %%
rng = np.random.default_rng(0)
weights = np.clip(np.rint(rng.normal(size=100_000) * 127 / 4), -127, 127).astype(np.int32)

fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for offset, encoding in enumerate(terms.ENCODINGS):
    counts = np.bincount(terms.count(weights, encoding), minlength=8)[:8]
    mean = terms.count(weights, encoding).mean()
    ax.bar(
        np.arange(8) + 0.2 * (offset - 1.5),
        100 * counts / len(weights),
        width=0.2,
        label=f"{encoding}, mean {mean:.2f}",
    )
ax.set(xlabel="terms per weight", ylabel="share of the weights (%)")
ax.legend()
plt.show()

# %% [markdown]
# ## A group on a budget
#
# Eight weights share k terms. `greedy` (term revealing) keeps the k largest terms; `optimal` finds
# the values of least squared error that fit the budget.

# %%
group = weights[:8]
budget = 8
options = {"group_size": 8, "budget": budget, "axis": 0}
kept = {
    method: np.asarray(terms.project(group, method=method, **options)) for method in terms.METHODS
}

fig, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
ax.bar(np.arange(8) - 0.27, group, width=0.27, label="int8 weight", color="0.6")
for offset, (method, v) in enumerate(kept.items()):
    error = np.square(group - v).sum()
    ax.bar(np.arange(8) + 0.27 * offset, v, width=0.27, label=f"{method}, squared error {error}")
ax.axhline(0, color="black", lw=0.8)
ax.set(
    xlabel="weight in the group",
    ylabel="value (integer units)",
    title=f"{budget} terms for {len(group)} weights",
)
ax.legend()
plt.show()

# %% [markdown]
# ## Error against budget
#
# One error curve per method over many groups. For the NAF the optimum's curve is convex, which is
# why the best budgets of several layers can be found by one water level on gain per cost.

# %%
grouped = weights[:40_000].reshape(-1, 8)
budgets = np.arange(1, 21)
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for method, encoding in (("greedy", "hese"), ("greedy", "naf"), ("optimal", "naf")):
    error = [
        np.square(
            grouped
            - terms.project(
                grouped, group_size=8, budget=k, axis=1, method=method, encoding=encoding
            )
        ).mean()
        for k in budgets
    ]
    ax.semilogy(budgets / 8, np.maximum(error, 1e-4), marker=".", label=f"{method}, {encoding}")
ax.set(
    xlabel="budget (terms per weight)",
    ylabel="mean squared error (integer units²)",
    ylim=(1e-2, None),
)
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %% [markdown]
# The optimum needs fewer terms than truncation for the same error. What that is worth in accuracy
# is another question, which `03_budget_sweep_pareto` asks.
