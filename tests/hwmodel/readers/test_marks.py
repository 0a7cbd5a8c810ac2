import jax
import jax.numpy as jnp

from stp_jax.hwmodel.readers.marks import Marks


def test_marks_survive_transformations_and_grow_with_their_operands():
    """What this file leans on in JAX: scopes and names under jit, scan and vmap."""
    marks = Marks()

    def layer(x, w):
        with marks.scope() as mark:
            return mark.on_result(mark.on_input(x) @ mark.on_weights(w))

    def model(x, w):
        return jax.vmap(jax.jit(layer), in_axes=(0, None))(x, w)

    jaxpr = jax.make_jaxpr(model)(jnp.ones((5, 2, 3)), jnp.ones((3, 4))).jaxpr
    (call,) = jaxpr.eqns
    eqns = call.params["jaxpr"].jaxpr.eqns
    (product,) = (eqn for eqn in eqns if eqn.primitive.name == "dot_general")
    assert marks.owns(product)
    assert not Marks().owns(product)
    of_input, weights, result = (marks.on_equation(e) for e in eqns if e.primitive.name == "name")
    assert of_input[1:] == ("input", 5 * 2 * 3)
    assert weights[1:] == ("weights", 12)
    assert result[1:] == ("result", 5 * 2 * 4)
    assert of_input[0] is weights[0] is result[0]
    assert (result[0].weights_size, result[0].result_size) == (12, 2 * 4)


def test_names_of_others_are_no_marks():
    def named(x):
        return jax.ad_checkpoint.checkpoint_name(x, "hidden")

    (eqn,) = jax.make_jaxpr(named)(1.0).jaxpr.eqns
    assert Marks().on_equation(eqn) is None
