"""The Llama-family decoder: its equations in NumPy, its cache, generation, llama2.c's files."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import hwmodel, models
from stp_jax.models.decoder import DecoderLM, generate, load_llama2c

SIZES = {"width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 24, "context": 12}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 9)), jnp.int32)


@nnx.jit
def called(model, tokens):
    return model(tokens)


@nnx.jit
def continued(model, tokens, caches, position):
    return model.continue_from(tokens, caches, position)


@pytest.fixture(scope="module")
def weights():
    """Weights of llama2.c's order and layout, float32."""
    rng = np.random.default_rng(1)
    width, depth, hidden, kv = 16, 2, 24, 8
    shapes = {
        "embed": (11, width),
        "attention_norm": (depth, width),
        "query": (depth, width, width),
        "key": (depth, kv, width),
        "value": (depth, kv, width),
        "out": (depth, width, width),
        "feed_forward_norm": (depth, width),
        "gate": (depth, hidden, width),
        "down": (depth, width, hidden),
        "up": (depth, hidden, width),
        "norm": (width,),
    }
    drawn = {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    return {k: v + 1 if "norm" in k else v for k, v in drawn.items()}


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama2c") / "model.bin"
    sizes = struct.pack("<7i", 16, 24, 2, 4, 2, 11, 12)
    angles = np.zeros(2 * 12 * 2, np.float32)
    path.write_bytes(sizes + b"".join(w.tobytes() for w in weights.values()) + angles.tobytes())
    return path


def reference(weights, tokens):
    """Logits token by token, as llama2.c computes them: matrices, loops, float64."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    width, heads, kv_heads, depth = 16, 4, 2, 2
    channels = width // heads

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2) + 1e-5) * scale

    def turn(x, position):
        x = x.reshape(-1, channels).copy()
        for head in x:
            for i in range(0, channels, 2):
                angle = position / 10000 ** (i / channels)
                a, b = head[i], head[i + 1]
                head[i] = a * np.cos(angle) - b * np.sin(angle)
                head[i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return x

    keys, values, logits = [[] for _ in range(depth)], [[] for _ in range(depth)], []
    for position, token in enumerate(tokens):
        x = w["embed"][token].copy()
        for layer in range(depth):
            h = norm(x, w["attention_norm"][layer])
            query = turn(w["query"][layer] @ h, position)
            keys[layer].append(turn(w["key"][layer] @ h, position))
            values[layer].append((w["value"][layer] @ h).reshape(kv_heads, channels))
            mixed = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                scores = np.array([k[shared] @ query[head] for k in keys[layer]])
                scores = np.exp(scores / np.sqrt(channels) - np.max(scores / np.sqrt(channels)))
                scores /= scores.sum()
                mixed.append(sum(s * v[shared] for s, v in zip(scores, values[layer], strict=True)))
            x += w["out"][layer] @ np.concatenate(mixed)
            h = norm(x, w["feed_forward_norm"][layer])
            gate = w["gate"][layer] @ h
            x += w["down"][layer] @ (gate / (1 + np.exp(-gate)) * (w["up"][layer] @ h))
        logits.append(w["embed"] @ norm(x, w["norm"]))
    return np.array(logits)


def test_logits_follow_the_equations(weights, file):
    model = load_llama2c(file)
    expected = np.stack([reference(weights, row) for row in np.asarray(TOKENS)])
    np.testing.assert_allclose(called(model, TOKENS), expected, rtol=2e-4, atol=2e-4)


def test_no_logit_depends_on_later_tokens(file):
    model = load_llama2c(file)
    changed = TOKENS.at[:, 5:].set(0)
    before, after = called(model, TOKENS), called(model, changed)
    np.testing.assert_allclose(after[:, :5], before[:, :5], atol=1e-5)
    assert not np.allclose(after[:, 5:], before[:, 5:], atol=1e-3)


@pytest.mark.parametrize("prompt", [1, 4, 9])
def test_a_cache_gives_what_the_whole_sequence_does(file, prompt):
    model = load_llama2c(file)
    logits, caches = continued(model, TOKENS[:, :prompt], model.empty_cache(2), 0)
    parts = [logits]
    for position in range(prompt, 9):
        one = TOKENS[:, position : position + 1]
        logits, caches = continued(model, one, caches, position)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), called(model, TOKENS), atol=2e-5)


def test_generation_takes_the_likeliest_token_each_time(file):
    model = load_llama2c(file)
    known = TOKENS
    for n in range(3, 9):  # no logit depends on what stands behind it
        following = jnp.argmax(called(model, known)[:, n - 1], axis=-1)
        known = known.at[:, n].set(following.astype(jnp.int32))
    np.testing.assert_array_equal(generate(model, TOKENS[:, :3], 6), known)
    np.testing.assert_array_equal(generate(model, TOKENS[:, :3], 0), TOKENS[:, :3])


def test_draws_depend_on_the_key_and_follow_the_softmax(file):
    model = load_llama2c(file)
    prompt = jnp.tile(TOKENS[:1, :3], (4000, 1))
    drawn = generate(model, prompt, 1, temperature=0.7, key=jax.random.key(3))[:, -1]
    expected = jax.nn.softmax(called(model, TOKENS)[0, 2] / 0.7)
    share = np.bincount(drawn, minlength=11) / 4000
    np.testing.assert_allclose(share, expected, atol=0.04)  # five deviations of a share of a half
    other = generate(model, prompt, 1, temperature=0.7, key=jax.random.key(4))[:, -1]
    assert not np.array_equal(drawn, other)


def test_wrong_calls_are_named(file):
    model = load_llama2c(file)
    with pytest.raises(ValueError, match="do not fit a context of 12"):
        generate(model, TOKENS, 4)
    with pytest.raises(ValueError, match="come with a key"):
        generate(model, TOKENS[:, :2], 2, temperature=1.0)
    for changes, message in (
        ({"heads": 3}, "heads 3 must divide width 16"),
        ({"kv_heads": 3}, "kv_heads 3 must divide heads 4"),
        ({"depth": 0}, "depth must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            DecoderLM(num_classes=11, rngs=nnx.Rngs(0), **{**SIZES, **changes})


def test_wrong_files_are_named(file, tmp_path):
    content = file.read_bytes()
    wrong = tmp_path / "wrong.bin"
    for damaged, message in (
        (content[:20], "too short"),
        (content[:-4], "bytes, where its sizes"),
        (content + b"\0", "bytes, where its sizes"),
        (struct.pack("<i", 0) + content[4:], "no llama2.c file"),
        (struct.pack("<i", 2**30) + content[4:], "bytes, where its sizes"),
        (content[:20] + struct.pack("<i", -11) + content[24:], "a last layer of its own"),
    ):
        wrong.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            load_llama2c(wrong)
    with pytest.raises(ValueError, match="there is no file"):
        load_llama2c(tmp_path / "none.bin")


def test_it_becomes_an_stp_model_with_a_cost(file):
    model = load_llama2c(file)
    stp = stp_jax.quantize(model, stp_jax.default_policy(model, budget=8))
    stp_jax.calibrate(stp, [TOKENS])
    assert len(stp_jax.budgets(stp)) == 2 * 7
    assert np.isfinite(np.asarray(called(stp, TOKENS))).all()
    assert generate(stp, TOKENS[:, :2], 3).shape == (2, 5)
    names = hwmodel.trace(stp, TOKENS[:1]).names
    assert {"blocks.0.attention.scores", "blocks.1.attention.context"} <= set(names)
    assert stp_jax.evaluate_model(stp, TOKENS[:1]).report.total_cycles > 0


def test_the_registry_has_it():
    model = models.create("decoder_lm", num_classes=11, rngs=nnx.Rngs(0), **SIZES)
    assert model(TOKENS).shape == (2, 9, 11)
