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
# # The accelerator's design space
#
# ResNet-18 on 224×224 images, thousands of arrays in one call: rows, columns, group size g and
# budget k vary. Budgets here are the same in every layer and every slot is taken to be full;
# trained weights do better. Accuracy depends on the terms per weight, so compare designs at equal
# terms per weight, or read `results.json` of a run beside this.

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plotly.express as px
import plotly.io as pio
from flax import nnx

from stp_jax import hwmodel, models

pio.renderers.default = "plotly_mimetype+notebook_connected"

# %% [markdown]
# Layer shapes are traced from the model; it is never run, and needs no weights.

# %%
model = nnx.eval_shape(lambda: models.create("resnet18", num_classes=1000, rngs=nnx.Rngs(0)))
network = hwmodel.trace(
    model, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32), name="ResNet-18"
)
print(f"{len(network)} layers, {network.macs / 1e9:.2f} billion multiply-accumulates")

# %% [markdown]
# ## The sweep

# %%
sizes = (8, 16, 24, 32, 48, 64, 128)
group_sizes = (4, 8, 16, 32)
terms_per_weight = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
grid = np.array(list(itertools.product(sizes, sizes, group_sizes, terms_per_weight)))
rows, cols, g = grid[:, :3].astype(int).T
designs = {
    "rows": rows,
    "cols": cols,
    "group_size": g,
    "budgets": (g * grid[:, 3]).astype(int),
    "dram_bandwidth": np.full(len(grid), 16.0),  # bytes a cycle
}
totals = hwmodel.sweep(network, designs)

arrays = hwmodel.Array(rows=rows, cols=cols, pe=hwmodel.GroupPE(group_size=g))
area = sum(np.asarray(part) for part in hwmodel.array_area_um2(arrays).values())
frame = pd.DataFrame(
    {
        "rows": rows,
        "cols": cols,
        "g": g,
        "k": designs["budgets"],
        "terms per weight": grid[:, 3],
        "cycles (millions)": totals["cycles"] / 1e6,
        "array and encoder energy (µJ)": (totals["array_pj"] + totals["encoder_pj"]) / 1e6,
        "energy with memory (mJ)": sum(v for n, v in totals.items() if n.endswith("_pj")) / 1e9,
        "area of PEs and encoders (mm²)": area / 1e6,
        "utilization (%)": 100 * totals["utilization"],
    }
)
print(f"{len(frame)} designs")
frame.describe().loc[["min", "50%", "max"]].round(2)

# %% [markdown]
# ## Cycles against area, interactively
#
# Choose the terms per weight with the slider; the pointer shows a design's numbers. Upper right is
# dominated: more area and more cycles.

# %%
px.scatter(
    frame,
    x="area of PEs and encoders (mm²)",
    y="cycles (millions)",
    color=frame["g"].astype(str),
    animation_frame="terms per weight",
    log_x=True,
    log_y=True,
    range_x=[0.03, 60],
    range_y=[frame["cycles (millions)"].min() / 1.5, frame["cycles (millions)"].max() * 1.5],
    hover_data=["rows", "cols", "k", "utilization (%)", "energy with memory (mJ)"],
    labels={"color": "group size g"},
    title="ResNet-18 at 224×224, input-stationary, 45 nm, 16 bytes of DRAM a cycle",
    height=520,
).show()

# %% [markdown]
# ## All measures at once
#
# Drag along an axis to keep a range of it.

# %%
chosen = frame[frame["terms per weight"] == 1.0]
px.parallel_coordinates(
    chosen[
        [
            "rows",
            "cols",
            "g",
            "cycles (millions)",
            "area of PEs and encoders (mm²)",
            "energy with memory (mJ)",
            "utilization (%)",
        ]
    ],
    color="cycles (millions)",
    title="designs at one term per weight",
    height=480,
).show()

# %% [markdown]
# ## Pareto fronts

# %%
x, y = "area of PEs and encoders (mm²)", "cycles (millions)"


def front(table):
    """The designs that no other beats in both area and cycles."""
    table = table.sort_values([x, y])
    return table[table[y] < table[y].cummin().shift(fill_value=np.inf)]


fig, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
for mean, table in frame.groupby("terms per weight"):
    best = front(table)
    ax.step(best[x], best[y], where="post", label=f"{mean:g} terms per weight")

parallel = {name: designs[name] for name in ("rows", "cols", "dram_bandwidth")}
int8 = hwmodel.sweep(network, parallel)
one = hwmodel.BitParallel().area_um2(hwmodel.HOROWITZ_45NM)
best = front(pd.DataFrame({x: rows * cols * one / 1e6, y: int8["cycles"] / 1e6}))
ax.step(best[x], best[y], where="post", color="black", ls="--", label="int8 multiply-accumulate")
ax.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title="least cycles for an area")
ax.legend()
ax.grid(alpha=0.3, which="both")
plt.show()

# %% [markdown]
# ## Where the cycles go
#
# One design, layer by layer.

# %%
array = hwmodel.Array(rows=32, cols=32, pe=hwmodel.GroupPE(group_size=8), dram_bandwidth=16.0)
report = hwmodel.evaluate(network, array, budgets=8)
fig, ax = plt.subplots(figsize=(10, 4), layout="constrained")
positions = np.arange(len(network))
ax.bar(positions, report.compute_cycles / 1e6, label="computing")
ax.bar(
    positions,
    report.stall_cycles / 1e6,
    bottom=report.compute_cycles / 1e6,
    label="waiting for DRAM",
)
ax.set_xticks(positions, network.names, rotation=90)
ax.set(ylabel="cycles (millions)", title="32×32 group PEs, g = 8, k = 8")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %%
fig, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
hwmodel.plot_roofline(ax, report, array)
plt.show()
