"""Flax's own example models, from `quantize` to a report: what of stp_jax works on foreign code.

    pip download --no-deps --no-binary flax flax==0.12.8 && tar -xf flax-0.12.8.tar.gz
    python benchmarks/flax_examples.py --examples flax-0.12.8/examples

The ImageNet ResNet-18 and the LM1B decoder (Linen) and Gemma (NNX), in small configurations and
with random weights, so that errors are compared and not accuracies. Every model goes through the
same steps: quantize, calibrate, scales by search, budgets for energy, compensation, the report,
integer arithmetic, a packed file and back. Gemma needs jaxtyping.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import stp_jax
from stp_jax import export, hwmodel

TERMS_PER_WEIGHT = 0.5
Example = tuple[Any, str, tuple[Any, ...], dict[str, Any]]  # model, exempt layers, inputs, options


def imagenet(seed: int, filters: int = 64) -> Example:
    """ResNet-18 on images of 64 × 64 pixels, with as many filters in its first layer."""
    models = importlib.import_module("models")
    images = jax.random.normal(jax.random.key(seed), (4, 64, 64, 3))
    model = models.ResNet18(num_classes=1000, num_filters=filters, dtype=jnp.float32)
    return model, "conv_init|Dense_0", (images,), {"train": False}


def lm1b(seed: int) -> Example:
    """A decoder of two layers over 64 tokens."""
    models = importlib.import_module("models")
    config = models.TransformerConfig(
        vocab_size=512,
        output_vocab_size=512,
        emb_dim=128,
        num_heads=4,
        num_layers=2,
        qkv_dim=128,
        mlp_dim=256,
        max_len=64,
        deterministic=True,
    )
    tokens = jax.random.randint(jax.random.key(seed), (16, 64), 1, 512)
    return models.TransformerLM(config), "", (tokens,), {}


def gemma(seed: int) -> Example:
    """Gemma 3 with two layers over 32 tokens."""
    configs, transformer = map(importlib.import_module, ("transformer_cfg", "transformer"))
    config = configs.TransformerConfig.gemma3_270m(
        num_layers=2,
        num_embed=512,
        embed_dim=128,
        hidden_dim=256,
        num_heads=4,
        head_dim=32,
        num_kv_heads=1,
        attention_types=configs.make_attention_layers_types((configs.AttentionType.GLOBAL,), 2),
        dtype=jnp.float32,
        weight_dtype=jnp.float32,
    )
    model = transformer.Transformer(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(seed), (16, 32), 1, 512)
    positions = jnp.broadcast_to(jnp.arange(32), (16, 32))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((32, 32), bool)), (16, 32, 32))
    return model, "", (tokens, positions, None, mask), {}


EXAMPLES: dict[str, Callable[[int], Example]] = {"imagenet": imagenet, "lm1b": lm1b, "gemma": gemma}


def quantized(example: Example) -> Any:
    """The example as an STP model, a Linen one with its variables."""
    model, exempt, inputs, options = example
    rules = [stp_jax.Rule(path=exempt)] if exempt else []
    rules.append(stp_jax.Rule(path=".*", budget=32))
    stp = stp_jax.quantize(model, stp_jax.Policy(rules))
    if isinstance(model, nn.Module):
        return stp.bind(stp.init(jax.random.key(1), *inputs, **options))
    return stp


def steps(make: Callable[[int], Example]) -> Iterator[tuple[str, Any]]:
    """What each step gives, by its name; errors are those on inputs that no step has seen."""
    _, _, inputs, options = example = make(0)
    _, _, others, _ = make(1)
    model = quantized(example)

    def call(model: Any, batch: tuple[Any, ...]) -> jax.Array:
        outputs = model(*batch, **options)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def error() -> str:
        difference = call(model, others) - exact
        return f"{float(jnp.linalg.norm(difference) / jnp.linalg.norm(exact)):.3f}"

    exact = call(stp_jax.quant.layers.without_quantizers(model), others)
    yield "layers with a budget", len(stp_jax.budgets(model))
    stp_jax.calibrate(model, [inputs], call=call)
    stp_jax.search_weight_scales(model)
    yield "error in int8", error()
    costs = stp_jax.term_costs(model, *inputs, per="energy", **options)
    budgets = stp_jax.allocate(model, TERMS_PER_WEIGHT, costs=costs)
    stp_jax.set_budgets(model, budgets)
    yield "error projected", error()
    stp_jax.compensate(model, [inputs], budgets, call=call)
    yield "error compensated", error()
    for technology in (hwmodel.NANGATE_45NM_GATES, hwmodel.HOROWITZ_45NM):
        cost = stp_jax.evaluate_model(model, *inputs, technology=technology, **options)
        yield f"saving, {technology.name}", f"{cost.saving:.2f}"
    yield "cycles", f"{int(cost.report.total_cycles):,}"
    try:
        integers = call(stp_jax.integer_model(model), others)
    except ValueError as error:
        yield "integers", f"refused: {error}".partition(";")[0]
    else:
        yield "integers differ by", f"{float(jnp.abs(integers - call(model, others)).max()):.1e}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        export.save_packed(model, path)
        yield "packed file, KiB", path.stat().st_size // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=Path, required=True, help="folder of Flax's examples")
    parser.add_argument("--only", choices=EXAMPLES)
    args = parser.parse_args()
    for name in [args.only] if args.only else EXAMPLES:
        folder = (args.examples / name).resolve()
        if not folder.is_dir():
            parser.error(f"--examples must hold {name}, got {args.examples}")
        print(name, flush=True)
        sys.path.insert(0, str(folder))
        begin = time.perf_counter()
        for step, value in steps(EXAMPLES[name]):
            print(f"  {step:24} {value}   ({time.perf_counter() - begin:.0f} s)", flush=True)
        sys.path.remove(str(folder))
        sys.modules.pop("models", None)


if __name__ == "__main__":
    main()
