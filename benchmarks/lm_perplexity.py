"""Perplexity of a small language model with few-term weights, beside Qwix's int8, int4 and GPTQ.

    python benchmarks/lm_perplexity.py --model stories260K.bin [--out FILE.json]

Weights only: activations, embeddings and norms stay float in every row, nothing is trained, no
labels are used. The text is what the float model itself writes at temperature 1, so that a row's
log-perplexity minus float's is the divergence of its predictions from float's, and no corpus is
needed; calibration has sequences of its own. Intervals are 95 % percentile bootstraps over the
evaluation's sequences, paired. Bits count all that a layer's weights take, float32 scales as well.
Qwix comes with the ``dev`` extra.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from qwix.contrib import gptq

import stp_jax
from stp_jax import export
from stp_jax.models.decoder import DecoderLM, generate, load_llama2c

TILES = (64, 32)  # weights that share a scale; most layers have 64 inputs, the others 172
BEGIN = 1  # llama2.c's token before a text
RESAMPLES = 10_000

Row = tuple[nnx.Module, float, float | None]  # the model, bits and terms a weight of its layers


def write_text(model: DecoderLM, count: int, length: int, seed: int) -> jax.Array:
    """Sequences that the model writes, int32 (count, length)."""
    begin = jnp.full((count, 1), BEGIN, jnp.int32)
    return generate(model, begin, length - 1, temperature=1.0, key=jax.random.key(seed))


@nnx.jit
def _losses(model: nnx.Module, tokens: jax.Array) -> jax.Array:
    logits = jax.nn.log_softmax(model(tokens[:, :-1]).astype(jnp.float32))  # type: ignore[operator]
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0].mean(axis=1)


def losses(model: nnx.Module, tokens: jax.Array, batch: int = 16) -> np.ndarray:
    """Mean negative log-likelihood of a token, by sequence."""
    parts = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    return np.concatenate([np.asarray(_losses(model, part)) for part in parts])


# --- Ways to quantize -----------------------------------------------------------------------------


def few_terms(
    model: DecoderLM, budget: int | None, prepare: Callable[[Any], Any], **options: Any
) -> Row:
    """A row of this library; ``prepare`` sets budgets and scales of the STP model."""
    rules = [
        stp_jax.Rule(
            path="blocks.*", budget=budget, weight_scale="search", activations="none", **options
        )
    ]
    found = stp_jax.quantize(model, stp_jax.Policy(rules))
    prepare(found)
    sizes, layers = export.packed_sizes(found).layers, stp_jax.quantized_layers(found)
    weights = sum(size.float32 for size in sizes.values()) / 4
    bits = 0.0
    for path, integers in stp_jax.integer_weights(found).items():
        layer = layers[path]
        dense = layer.rule.bits * integers.size + 8 * layer.shared_scale.nbytes
        bits += min(8 * sizes[path].packed, dense)
    return found, bits / weights, stp_jax.terms_per_weight(found, layers)


def reconstruction(calibration: list[jax.Array]) -> Callable[[Any], Any]:
    """Reconstruction at a model's own budgets, on these sequences."""
    return lambda found: stp_jax.reconstruct(found, calibration, stp_jax.budgets(found))


def at(model: DecoderLM, calibration: list[jax.Array], terms: float) -> dict[str, Row]:
    """The ways at so many terms per weight."""
    k, search = round(8 * terms), stp_jax.search_weight_scales
    return {
        "term revealing": few_terms(model, k, search, method="greedy", encoding="hese"),
        "projected": few_terms(model, k, search),
        **{f"projected, scales by {n}": few_terms(model, k, search, scale_group=n) for n in TILES},
        "reconstructed": few_terms(model, k, reconstruction(calibration)),
    }


def qwix_row(
    model: DecoderLM, bits: int, tile: int | None, calibration: list[jax.Array] | None = None
) -> Row:
    """Qwix's post-training weights, by GPTQ where there are sequences for it.

    Qwix cuts an axis into whole tiles only; where they do not fit, a scale is by channel.
    """
    kernels = {
        "/".join(map(str, path)): layer.kernel.shape
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, nnx.Linear)
    }
    tiles = {p: tile if tile and not n % tile else None for p, (n, _) in kernels.items()}
    weights = sum(n * m for n, m in kernels.values())
    scales = sum(n // (tiles[path] or n) * m for path, (n, m) in kernels.items())

    def rules(kind: Any) -> list[Any]:
        return [
            kind(module_path=path, weight_qtype=f"int{bits}", **({"tile_size": t} if t else {}))
            for path, t in tiles.items()
        ]

    example = jnp.ones((1, 8), jnp.int32)
    provider = qwix.PtqProvider(rules(qwix.QuantizationRule))
    quantized = qwix.quantize_model(nnx.clone(model), provider, example)
    if calibration is not None:
        observer = gptq.GptqCalibrationProvider(rules(gptq.GptqRule))
        observed = qwix.quantize_model(nnx.clone(model), observer, example)
        for tokens in calibration:
            observed(tokens)
        params = gptq.quantize_params(
            nnx.to_pure_dict(nnx.state(model, nnx.Param)),
            quantized,
            nnx.to_pure_dict(nnx.state(observed, qwix.QuantStat)),
        )
        nnx.update(quantized, params)
    return quantized, bits + 32 * scales / weights, None


# --- Measuring ------------------------------------------------------------------------------------


def compare(
    rows: Mapping[str, Row], reference: np.ndarray, tokens: jax.Array, seed: int
) -> dict[str, dict[str, Any]]:
    """Perplexities, and how far the log-perplexity lies above float's."""
    draws = np.random.default_rng(seed).integers(0, len(tokens), (RESAMPLES, len(tokens)))
    found = {}
    for name, (model, bits, terms) in rows.items():
        more = losses(model, tokens) - reference
        low, high = np.percentile(more[draws].mean(axis=1), [2.5, 97.5])
        found[name] = {
            "bits_per_weight": round(bits, 3),
            "terms_per_weight": None if terms is None else round(terms, 3),
            "perplexity": float(np.exp((reference + more).mean())),
            "divergence": float(more.mean()),
            "low": float(low),
            "high": float(high),
        }
        print(
            f"{name:46} {bits:5.2f} bits {'' if terms is None else f'{terms:5.2f} terms':11} "
            f"perplexity {found[name]['perplexity']:7.3f}  divergence {more.mean():.4f} "
            f"({low:.4f} to {high:.4f})",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a llama2.c file")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--points", type=float, nargs="+", default=[2.0, 1.5, 1.0, 0.75, 0.5])
    parser.add_argument("--sequences", type=int, default=128, help="to evaluate on")
    parser.add_argument("--calibration", type=int, default=128, help="sequences to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        model = load_llama2c(arguments.model)
    except ValueError as error:
        parser.error(str(error))
    model.eval()
    size = {"length": arguments.length}
    tokens = write_text(model, arguments.sequences, seed=2 * arguments.seed, **size)
    text = write_text(model, arguments.calibration, seed=2 * arguments.seed + 1, **size)
    calibration = [text[i : i + 32] for i in range(0, len(text), 32)]
    reference = losses(model, tokens)
    print(f"float: perplexity {np.exp(reference.mean()):.3f}, {tokens.size} tokens", flush=True)
    search = stp_jax.search_weight_scales
    rows: dict[str, Row] = {"int8": few_terms(model, 32, search)}
    rows["int4"] = few_terms(model, 16, search, bits=4)
    for tile in TILES:
        rows[f"int4, scales by {tile}"] = few_terms(model, 16, search, bits=4, scale_group=tile)
    rows["int4, reconstructed"] = few_terms(model, 16, reconstruction(calibration), bits=4)
    for bits, tile in ((8, None), (4, None), (4, 32)):
        by = "" if tile is None else f", scales by {tile}"
        rows[f"Qwix int{bits}{by}"] = qwix_row(model, bits, tile)
    for tile in (None, 32):
        by = "" if tile is None else f", scales by {tile}"
        rows[f"Qwix GPTQ int4{by}"] = qwix_row(model, 4, tile, calibration)
    found = compare(rows, reference, tokens, arguments.seed)
    for terms in arguments.points:
        ways = {f"{terms:g} {name}": row for name, row in at(model, calibration, terms).items()}
        found |= compare(ways, reference, tokens, arguments.seed)
    if arguments.out:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "qwix")}
        settings = {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)}
        weights = {
            "file": arguments.model.name,
            "sha256": hashlib.sha256(arguments.model.read_bytes()).hexdigest(),
        }
        content = {
            "weights": weights,
            "settings": settings,
            "versions": versions,
            "float": {"perplexity": float(np.exp(reference.mean())), "tokens": int(tokens.size)},
            "rows": found,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
