"""Attention over positions that devices share: numbers and memory. test_context.py runs this on eight devices."""

import math
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm.models import TransformerConfig, logprobs, transformer
from jaxrl_llm.models.attention import splash_attention
from jaxrl_llm.models.experts import ExpertsConfig, expert_mlp, route
from jaxrl_llm.models.layer_kinds import LatentConfig
from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.parallel import laid_out, make_mesh
from jaxrl_llm.training.segments import abstract_like, parameter_shardings

ROWS, LENGTH = 2, 2048
MODEL = transformer(
    TransformerConfig(
        vocabulary_size=512, width=64, layers=2, heads=4, kv_heads=2, layer_loop="scanned", remat="attention"
    )
)
ALL_SHARE = {"one": {}, "sequence 8": {"sequence": 8}, "sequence 4 x tensor 2": {"sequence": 4, "tensor": 2}}

# Experts on several devices, the hidden units of each one on several.
EXPERT_LAYOUTS = {"2 x 2 x 2": {"fsdp": 2, "expert": 2, "tensor": 2}, "1 x 8": {"tensor": 8}}


def loss(params, tokens):
    """Mean log-probability of each next token."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    hidden, _ = MODEL.apply(params, tokens, positions, None)
    return token_statistics(MODEL, params, hidden, jnp.roll(tokens, -1, axis=1)).logprobs.mean()


def gradient(mesh):
    """The compiled gradient of `loss`, and its arguments."""
    lies = parameter_shardings(MODEL, mesh)
    rows = NamedSharding(mesh, P(None, "sequence"))
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=rows)
    program = jax.jit(laid_out(jax.value_and_grad(loss), mesh), out_shardings=(NamedSharding(mesh, P()), lies))
    drawn = jax.device_put(MODEL.init(jax.random.key(0)), lies)
    given = jax.device_put(jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, 512), rows)
    return program.lower(abstract_like(shapes, lies), tokens).compile(), drawn, given


def splash(mesh):
    """Values and gradients of the splash kernel, in the interpreter, on rows that are padded on either side."""
    rng = np.random.default_rng(0)
    shape = (2, 2, 300, 16)
    queries = jnp.asarray(rng.standard_normal((2, 300, 2, 2, 16)), jnp.float32)
    keys, values = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    seen = jnp.stack([jnp.arange(300), jnp.maximum(jnp.arange(300) - 40, -1)])
    real = (seen >= 0)[:, :, None, None, None]

    def value(queries, keys, values):
        path = partial(splash_attention, scale=0.3, window=None, cap=None, interpret=True)
        attended = jnp.where(real, path(queries, keys, values, seen), 0.0)
        return jnp.sum(jnp.sin(attended)), attended

    (_, attended), slopes = jax.jit(laid_out(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True), mesh))(
        queries, keys, values
    )
    return {"values": attended, **{f"slope {i}": slope for i, slope in enumerate(slopes)}}


def experts(mesh, product: str) -> dict[str, np.ndarray]:
    """A mixture of experts with biases, and all of its gradients."""
    rng, (count, width, hidden) = np.random.default_rng(0), (4, 8, 16)
    shapes = {
        "x": (8, 6, width),
        "router": (width, count),
        "gate_up": (count, width, 2, hidden),
        "down": (count, hidden, width),
        "gate_up_bias": (count, 2, hidden),
        "down_bias": (count, width),
    }
    arrays = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}

    def value(arrays):
        matrices = dict(arrays)
        x, router = matrices.pop("x"), matrices.pop("router")
        gated = lambda gate, up: jax.nn.silu(gate) * up  # noqa: E731
        found = expert_mlp(
            x, route(x, router, ExpertsConfig(count, 2)), gated=gated, ragged=product == "ragged", **matrices
        )
        return jnp.sin(found / 10).sum(), found

    (_, found), slopes = jax.jit(laid_out(jax.value_and_grad(value, has_aux=True), mesh))(arrays)
    return {"values": found, **{f"slope {name}": slope for name, slope in slopes.items()}}


def latent_bytes(mesh) -> int:
    """Temporary memory of a gradient through latent attention, most of which is scores of all heads."""
    latent = LatentConfig(rank=8, rope_width=4, plain_width=4, value_width=4)
    model = transformer(
        TransformerConfig(32, width=16, layers=2, heads=8, kv_heads=8, head_width=4, latent=latent, qk_norm=False)
    )
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def total(params, tokens):
        return model.apply(params, tokens, jnp.arange(512)[None], None)[0].sum()

    shapes = abstract_like(jax.eval_shape(model.init, jax.random.key(0)), parameter_shardings(model, mesh))
    compiled = jax.jit(laid_out(jax.grad(total), mesh)).lower(shapes, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def vocabulary_pass(mesh) -> dict[str, np.ndarray]:
    """The largest array with a whole vocabulary, and the largest that a loop over chunks communicates."""
    vocabulary = 4096
    model = transformer(TransformerConfig(vocabulary_size=vocabulary, width=64, layers=1, heads=2, kv_heads=2))
    logprobs.SCORES_PER_CHUNK = 2**18

    def total(params, hidden, tokens):
        return token_statistics(model, params, hidden, tokens, entropy=True).logprobs.sum()

    lies, rows = parameter_shardings(model, mesh), NamedSharding(mesh, P("fsdp", "sequence"))
    arguments = (
        abstract_like(jax.eval_shape(model.init, jax.random.key(0)), lies),
        jax.ShapeDtypeStruct((16, 256, 64), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((16, 256), jnp.int32, sharding=rows),
    )
    program = jax.jit(laid_out(jax.grad(total, argnums=(0, 1)), mesh), out_shardings=(lies, rows))
    text = program.lower(*arguments).compile().as_text()
    shapes = [tuple(map(int, found.split(","))) for found in re.findall(r"\bf32\[([\d,]+)\]", text)]
    moved = re.findall(r"= f32\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|reduce-scatter)\(.*/while", text)
    whole = [math.prod(shape) for shape in shapes if vocabulary in shape]
    return {
        "whole": np.asarray(max(whole, default=0)),
        "moved in a loop": np.asarray([math.prod(map(int, filter(None, s.split(",")))) for s in moved]),
        "half": np.asarray(any(vocabulary // 2 in shape for shape in shapes)),
    }


def main(path: str) -> None:
    found = {}
    for name, sizes in ALL_SHARE.items():
        compiled, *arguments = gradient(make_mesh(1 if name == "one" else 8, sizes))
        value, grads = compiled(*arguments)
        found[f"{name}|loss"] = value
        found[f"{name}|bytes"] = compiled.memory_analysis().temp_size_in_bytes
        for place, leaf in jax.tree_util.tree_leaves_with_path(grads):
            found[f"{name}|gradient{jax.tree_util.keystr(place)}"] = leaf
    for name, mesh in (("one", None), ("split", make_mesh(8, {"fsdp": 2, "sequence": 2, "tensor": 2}))):
        found |= {f"splash {name}|{key}": value for key, value in splash(mesh).items()}
    for product in ("ragged", "dense"):
        for name, sizes in {"one": None, **EXPERT_LAYOUTS}.items():
            of = experts(sizes and make_mesh(8, sizes), product)
            found |= {f"experts {product}, {name}|{key}": value for key, value in of.items()}
    found |= {f"latent {n}|bytes": latent_bytes(make_mesh(n, {"tensor": n})) for n in (1, 8)}
    found |= {
        f"vocabulary|{k}": v for k, v in vocabulary_pass(make_mesh(8, {"fsdp": 2, "sequence": 2, "tensor": 2})).items()
    }
    np.savez(path, **{name: np.asarray(value) for name, value in found.items()})


if __name__ == "__main__":
    main(sys.argv[1])
