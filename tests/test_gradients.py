"""Gradients as the scores see them: losses, samples, batches, and what they say of channels that do nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from graphprune.calibration import Calibration
from graphprune.errors import OptionError
from graphprune.gradients.objective import SIGNS, objective
from graphprune.gradients.saliency import gate_gradients, weight_fisher
from graphprune.gradients.vjp.program import Program
from graphprune.graph.twin import build_twin
from graphprune.model import as_ir
from graphprune.network import Network
from graphprune.pipeline import analyze_ir
from graphprune.scores import Evidence, find_score

from .derivatives import in_runtime

Array = np.ndarray[Any, Any]

#: Channels of the first layer that the second does not read.
USELESS = (1, 4, 6)
CLASSES = 3


def weights() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    made = {
        "w1": rng.standard_normal((8, 2, 3, 3)) * 0.5,
        "b1": rng.standard_normal(8) * 0.3,
        "w2": rng.standard_normal((6, 8, 1, 1)) * 0.5,
        "b2": rng.standard_normal(6) * 0.3,
        "w3": rng.standard_normal((CLASSES, 6)),
        "b3": rng.standard_normal(CLASSES) * 0.1,
    }
    made["w2"][:, USELESS] = 0
    return {name: array.astype(np.float32) for name, array in made.items()}


def classifier(
    tail: tuple[str, ...] = (), batch: int | str = "batch", changed: dict[str, Array] | None = None
) -> onnx.ModelProto:
    """Conv, Tanh, Conv, Tanh, pooling, Gemm, and ``tail``."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1"),
        helper.make_node("Tanh", ["c1"], ["t1"]),
        helper.make_node("Conv", ["t1", "w2", "b2"], ["c2"], "conv2"),
        helper.make_node("Tanh", ["c2"], ["t2"]),
        helper.make_node("GlobalAveragePool", ["t2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y0"], "head", transB=1),
        *(helper.make_node(kind, [f"y{k}"], [f"y{k + 1}"], kind) for k, kind in enumerate(tail)),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", 1, (batch, 2, 6, 6))],
        [helper.make_tensor_value_info(f"y{len(tail)}", 1, (batch, CLASSES))],
        [numpy_helper.from_array(array, name) for name, array in {**weights(), **(changed or {})}.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def network(**options: Any) -> Network:
    return analyze_ir(as_ir(classifier(**options))[0])


def samples(count: int = 7, *, labelled: bool = False, batch: int | None = None) -> Calibration:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((count, 2, 6, 6)).astype(np.float32)
    labels = rng.integers(0, CLASSES, count) if labelled else None
    return Calibration({"x": x}, {}, batch, labels)


def rows(*arguments: Any, **options: Any) -> Array:
    return np.concatenate(list(gate_gradients(*arguments, **options)))


def group_labels(found: Network, name: str) -> Array:
    (group,) = (g for g in found.groups if g.name == name)
    return group.labels


def logits(model: onnx.ModelProto, x: Array) -> Array:
    return np.asarray(in_runtime(model)({"x": x})[0], dtype=np.float64)


def log_softmax(z: Array) -> Array:
    shifted = z - z.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


# -- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [(), ("Softmax",), ("LogSoftmax",), ("Identity",)], ids=str)
def test_rows_are_the_slopes_of_each_samples_cross_entropy(tail: tuple[str, ...]) -> None:
    """A gate of one channel is a factor of what the second layer reads of it."""
    found, inputs = network(tail=tail), samples(labelled=True)
    given = rows(found, inputs)
    assert inputs.labels is not None

    def losses(channel: int, factor: float) -> Array:
        w2 = weights()["w2"]
        w2[:, channel] *= factor
        z = logits(classifier(changed={"w2": w2}), np.asarray(inputs.inputs["x"]))
        return np.asarray(-log_softmax(z)[np.arange(len(z)), np.asarray(inputs.labels)])

    for channel, label in enumerate(group_labels(found, "w1[0]").tolist()):
        slope = (losses(channel, 1.01) - losses(channel, 0.99)) / 0.02
        np.testing.assert_allclose(given[:, label], slope, rtol=0, atol=2e-4)


def seeds_for(tail: tuple[str, ...], loss: str) -> tuple[Array, list[Array]]:
    """The outputs of one sample, and the seeds of the backward run for every choice of signs."""
    twin = build_twin(as_ir(classifier(tail, batch=1))[0])
    program = Program(twin)
    program.write_forward()
    made = objective(program, {}, loss, labelled=False)
    ((tensor, seed),) = made.seeds.items()
    (name,) = made.signs
    assert name.startswith(SIGNS)
    program.output(seed)
    program.output(program.value(tensor))
    run = in_runtime(program.finish())
    x = np.asarray(samples(1).inputs["x"])
    found, y = [], np.zeros(0)
    for signs in itertools.product([-1.0, 1.0], repeat=CLASSES):
        v, y = run({"x": x, name: np.asarray([signs], np.float32)})
        found.append(v[0].astype(np.float64))
    return y[0].astype(np.float64), found


def test_signs_give_the_curvature_of_the_cross_entropy() -> None:
    """The mean of v v^T over all signs is diag(p) - p p^T, the Hessian by the logits."""
    z, seeds = seeds_for(("Softmax",), "auto")
    p = np.exp(log_softmax(z))
    np.testing.assert_allclose(
        np.mean([np.outer(v, v) for v in seeds], axis=0), np.diag(p) - np.outer(p, p), atol=1e-6
    )


def test_signs_give_the_curvature_of_the_relative_distance() -> None:
    y, seeds = seeds_for((), "distance")
    np.testing.assert_allclose(
        np.mean([np.outer(v, v) for v in seeds], axis=0), np.eye(CLASSES) / (y @ y), atol=1e-6
    )


def test_fisher_is_the_curvature_of_the_divergence_from_the_original() -> None:
    """Over many draws, half the mean square of the rows is half the second difference of KL(original, pruned)."""
    found = network()
    x = np.asarray(samples(1).inputs["x"])
    many = Calibration({"x": np.repeat(x, 4000, axis=0)}, {})
    score = 0.5 * (rows(found, many) ** 2).mean(axis=0)
    original = log_softmax(logits(classifier(), x))[0]

    def divergence(channel: int, factor: float) -> float:
        w2 = weights()["w2"]
        w2[:, channel] *= factor
        z = log_softmax(logits(classifier(changed={"w2": w2}), x))[0]
        return float((np.exp(original) * (original - z)).sum())

    step = 0.2
    for channel, label in enumerate(group_labels(found, "w1[0]").tolist()):
        curvature = (divergence(channel, 1 + step) + divergence(channel, 1 - step)) / step**2
        assert score[label] == pytest.approx(0.5 * curvature, rel=0.15, abs=2e-5)


@pytest.mark.parametrize(
    ("tail", "kind"),
    [
        ((), "cross-entropy"),
        (("Softmax",), "cross-entropy"),
        (("Sigmoid",), "distance"),
        (("Tanh",), "distance"),
    ],
    ids=str,
)
def test_auto_takes_the_cross_entropy_of_classes(tail: tuple[str, ...], kind: Any) -> None:
    found, inputs = network(tail=tail), samples()
    np.testing.assert_array_equal(rows(found, inputs), rows(found, inputs, loss=kind))


# -- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 7, 32])
def test_rows_do_not_depend_on_the_batch(labelled: bool, batch: int) -> None:
    found, inputs = network(), samples(labelled=labelled)
    np.testing.assert_allclose(rows(found, inputs, batch=batch), rows(found, inputs), rtol=0, atol=1e-6)


def test_rows_are_those_of_a_model_of_one_sample() -> None:
    fixed, free = network(batch=1), network()
    np.testing.assert_allclose(
        rows(fixed, samples(labelled=True, batch=1)), rows(free, samples(labelled=True)), atol=1e-6
    )


def test_directions_follow_from_the_seed() -> None:
    found, inputs = network(), samples()
    np.testing.assert_array_equal(rows(found, inputs, seed=5), rows(found, inputs, seed=5))
    assert (rows(found, inputs, seed=5) != rows(found, inputs, seed=6)).any()


def test_progress_counts_samples() -> None:
    seen: list[tuple[int, int]] = []
    rows(network(), samples(), batch=3, progress=lambda done, whole: seen.append((done, whole)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_only_the_groups_asked_about() -> None:
    found, inputs = network(), samples()
    (group,) = (g for g in found.groups if g.name == "w1[0]")
    asked, whole = rows(found, inputs, groups=[group]), rows(found, inputs)
    np.testing.assert_allclose(asked[:, group.labels], whole[:, group.labels], atol=1e-6)
    others = np.setdiff1d(np.arange(asked.shape[1]), group.labels)
    assert not asked[:, others].any()
    assert whole[:, others].any()


# -- weights --------------------------------------------------------------------------------------------------------


def test_weight_fisher_sums_squares_of_weight_times_slope() -> None:
    found, inputs = network(), samples(3, labelled=True)
    given = np.concatenate(list(weight_fisher(found, inputs)))
    x, y = np.asarray(inputs.inputs["x"]), np.asarray(inputs.labels)
    expected = np.zeros((3, 8))
    for name, axis in (("w1", 0), ("b1", 0), ("w2", 1)):
        base = weights()[name]
        for index in np.ndindex(base.shape):

            def losses(by: float, name: str = name, index: tuple[int, ...] = index) -> Array:
                changed = weights()[name]
                changed[index] += by
                z = logits(classifier(changed={name: changed}), x)
                return np.asarray(-log_softmax(z)[np.arange(len(z)), y])

            if base[index]:
                slope = (losses(0.02) - losses(-0.02)) / 0.04
                expected[:, index[axis]] += (slope * base[index]) ** 2
    np.testing.assert_allclose(given[:, group_labels(found, "w1[0]")], expected, rtol=1e-2, atol=1e-7)


# -- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_channels_that_nobody_reads_go_first(name: str, labelled: bool) -> None:
    found = network()
    scores = find_score(name)(Evidence(found, samples(labelled=labelled)))
    mine = scores[group_labels(found, "w1[0]")]
    assert scores.shape == (len(found.analysis.atoms),)
    assert (mine[list(USELESS)] == 0).all()
    assert (np.delete(mine, USELESS) > 0).all()


def test_obd_is_least_for_what_has_no_effect() -> None:
    """Nothing that makes or reads a useless channel has a gradient, or is not zero."""
    found = network()
    scores = find_score("obd")(Evidence(found, samples()))
    mine = scores[group_labels(found, "w1[0]")]
    assert (mine[list(USELESS)] == 0).all()
    assert (np.delete(mine, USELESS) > 0).all()


def test_scores_are_the_means_that_their_formulas_say() -> None:
    found, inputs = network(), samples(labelled=True)
    evidence, given = Evidence(found, inputs), rows(found, inputs)
    squares = np.concatenate(list(weight_fisher(found, inputs)))
    np.testing.assert_allclose(find_score("taylor")(evidence), np.abs(given).mean(axis=0))
    np.testing.assert_allclose(find_score("fisher")(evidence), 0.5 * (given**2).mean(axis=0))
    np.testing.assert_allclose(find_score("obd")(evidence), 0.5 * squares.mean(axis=0))


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["taylor", "fisher", "obd"])
def test_without_inputs_there_are_no_gradients(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name}.*--calib"):
        find_score(name)(Evidence(network()))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 2, 3, 0, 1, 2]), r"must lie in 0 \.\.\. 2"),
        (np.array([0.0] * 7), "must be 7 x one integers"),
        (np.zeros((7, 2), int), "must be 7 x one integers"),
    ],
    ids=["range", "type", "shape"],
)
def test_labels_must_fit(labels: Array, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rows(network(), samples(), labels=labels)


def test_an_unknown_loss() -> None:
    with pytest.raises(OptionError, match="unknown loss"):
        rows(network(), samples(), loss="hinge")


def test_a_batch_hides_the_gradients_of_weights() -> None:
    with pytest.raises(OptionError, match="cannot be told apart"):
        list(weight_fisher(network(batch=7), samples(batch=7)))
