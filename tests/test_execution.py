"""Running a model in stages, against running the whole of it with every value exposed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import ModelError
from graphprune.layers.execution import Feeds, Piece, StagedRun, constant_contents, reads
from graphprune.runtime import make_session

from .activations import Array, activations
from .twins import parse

BATCHES = 3


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


#: Values that are read once, twice, late, never, and by the graph's outputs; an input that is read last of all.
TEXT = """agraph (float[N,4] x, float[N,4] z) => (float[N,4] y, float[N,4] early) {
    a = MatMul(x, w)
    early = Relu(a)
    b, rest = Split<axis=1, num_outputs=2>(early)
    unread = Neg(rest)
    c = Concat<axis=1>(rest, b)
    twice = Mul(constant, two)
    d = Mul(c, twice)
    e = Add(d, a)
    y = Sub(e, z)
}"""


def model() -> ir.Model:
    return parse(TEXT, w=normal(4, 4), constant=normal(4, seed=1), two=np.array(2, np.float32))


def batches(count: int = BATCHES, samples: int = 2) -> list[Feeds]:
    return [{"x": normal(samples, 4, seed=2 + i), "z": normal(samples, 4, seed=9 + i)} for i in range(count)]


def check(run: StagedRun, whole: list[dict[str, Array]], kept: Iterable[str] = ()) -> None:
    """What is held is what later nodes and the outputs read, and all of it is right."""
    later = {value.name for node in run.nodes[run.position :] for value in reads(node)} | {"y", "early"}
    made = {output.name for node in run.nodes[run.position :] for output in node.outputs}
    inits = {"w", "constant", "two"}
    for held, values in zip(run.batches(), whole, strict=True):
        assert set(held) == ((later - made - inits) | set(kept))
        for name, array in held.items():
            np.testing.assert_allclose(array, values[name], rtol=1e-6, atol=1e-6)


@given(st.lists(st.integers(0, 9), max_size=5))
@settings(deadline=None, max_examples=25)
def test_at_every_position_it_is_the_whole_model(positions: list[int]) -> None:
    net = model()
    whole = [activations(ir.to_proto(net), feeds) for feeds in batches()]
    with StagedRun(net, iter(batches())) as run:
        assert len(run) == BATCHES
        check(run, whole)
        for position in sorted(positions):
            run.advance(position)
            assert run.position == position
            check(run, whole)
        rest = run.rest()
        for held, values in zip(run.batches(), whole, strict=True):
            for name, array in {**held, **rest.run(held)}.items():
                np.testing.assert_allclose(array, values[name], rtol=1e-6, atol=1e-6)


def test_it_does_not_go_back() -> None:
    with StagedRun(model(), batches()) as run:
        run.advance(5)
        run.advance(2)
        assert run.position == 5


def test_values_are_kept_until_they_are_released() -> None:
    net = model()
    whole = [activations(ir.to_proto(net), feeds) for feeds in batches()]
    with StagedRun(net, batches()) as run:
        after_b = run.index[next(node for node in run.nodes if node.op_type == "Split")] + 1
        run.advance(after_b + 1, keep=["unread"])
        check(run, whole, kept=["unread"])
        run.release("unread")
        check(run, whole)
        concat = run.index[next(node for node in run.nodes if node.op_type == "Concat")]
        run.advance(concat + 1, keep=["b"])  # held already, and read for the last time
        check(run, whole, kept=["b"])
        run.release("a")  # still to be read: it stays
        check(run, whole, kept=["b"])
        run.release("b")
        check(run, whole)


def test_weights_may_change_before_they_are_read() -> None:
    net = model()
    before = [activations(ir.to_proto(net), feeds) for feeds in batches()]
    with StagedRun(net, batches()) as run:
        run.advance(run.index[next(node for node in run.nodes if node.op_type == "Split")])
        for name in ("w", "constant"):
            value = net.graph.initializers[name]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * 3, name=name)
        run.advance(len(run.nodes))
        for held, feeds, old in zip(run.batches(), batches(), before, strict=True):
            a = old["a"]  # the product was made with the weight as it was
            relu = np.maximum(a, 0)
            scale = 6 * normal(4, seed=1)
            wanted = np.concatenate([relu[:, 2:], relu[:, :2]], axis=1) * scale + a - feeds["z"]
            np.testing.assert_allclose(held["y"], wanted, rtol=1e-5, atol=1e-5)


# -- memory -----------------------------------------------------------------------------------------------------------


def large() -> tuple[ir.Model, list[Feeds]]:
    text = """agraph (float[N,1000] x) => (float[N,1000] y) {
        a = Relu(x)  b = Neg(a)  c = Add(b, x)  y = Mul(c, a)
    }"""
    return parse(text), [{"x": normal(20, 1000, seed=i)} for i in range(BATCHES)]


@pytest.mark.parametrize("memory", [0, 100_000, 300_000])
def test_what_does_not_fit_goes_to_disk(memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    net, feeds = large()
    whole = [activations(ir.to_proto(net), each) for each in feeds]
    each = feeds[0]["x"].nbytes

    def files() -> list[Path]:
        return list(tmp_path.rglob("*.npy"))

    def held() -> Iterator[tuple[Array, Array]]:
        for batch, values in zip(run.batches(), whole, strict=True):
            for name, array in batch.items():
                yield array, values[name]

    with StagedRun(net, iter(feeds), memory) as run:
        for position in range(len(run.nodes) + 1):
            run.advance(position)
            in_memory = 0
            for array, wanted in held():
                assert np.array_equal(array, wanted)
                in_memory += 0 if isinstance(array, np.memmap) else array.nbytes
            assert in_memory <= memory
            assert len(files()) * each + in_memory == sum(array.nbytes for array, _ in held())
        assert files()
    assert not list(tmp_path.iterdir())


def test_files_go_when_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, feeds = large()
    feeds[1]["x"] = feeds[1]["x"][:, :500]
    multiplied = parse(
        "agraph (float[N,1000] x) => (float[N,1000] y) { a = Relu(x)  y = Mul(a, w) }", w=normal(1000)
    )
    with pytest.raises(ModelError, match="cannot run"), StagedRun(multiplied, feeds, 0) as run:
        run.advance(2)
    assert run.position == 0
    assert not list(tmp_path.iterdir())


# -- subgraphs --------------------------------------------------------------------------------------------------------

IF = """agraph (float[N,4] x, bool choose) => (float[N,4] y) {
    a = MatMul(x, w)
    b = Relu(a)
    c = Neg(x)
    d = If(choose) <
        then_branch = g1 () => (float[N,4] t) { t = Add(a, v) },
        else_branch = g2 () => (float[N,4] e) { s = MatMul(c, w)  e = Mul(s, x) }
    >
    y = Add(d, b)
}"""


@pytest.mark.parametrize("choose", [True, False])
def test_what_the_bodies_of_an_if_capture_is_held(choose: bool) -> None:
    net = parse(IF, w=normal(4, 4), v=normal(4, seed=1))
    feeds = {"x": normal(2, 4, seed=2), "choose": np.array(choose)}
    wanted = activations(ir.to_proto(net), feeds)
    for position in range(5):
        with StagedRun(net, [feeds]) as run:
            run.advance(position)
            (held,) = run.batches()
            for name, array in {**held, **run.rest().run(held)}.items():
                np.testing.assert_allclose(array, wanted[name], rtol=1e-6, atol=1e-6)
            if position == 3:
                assert set(held) == {"a", "b", "c", "x", "choose"}
    with StagedRun(net, [feeds]) as run:
        for position in range(6):
            run.advance(position)
        (held,) = run.batches()
        np.testing.assert_allclose(held["y"], wanted["y"], rtol=1e-6, atol=1e-6)


def test_what_the_body_of_a_loop_captures_is_held() -> None:
    text = """agraph (float[N,4] x) => (float[N,4] y) {
        a = Relu(x)
        b = Neg(x)
        first = Identity(b)
        c = Loop(times, yes, first) <
            body = g (int64 i, bool going, float[N,4] s) => (bool on, float[N,4] t) {
                on = Identity(going)
                m = MatMul(s, w)
                t = Add(m, a)
            }
        >
        y = Add(c, b)
    }"""
    net = parse(text, w=normal(4, 4) / 4, times=np.array(3), yes=np.array(True))
    feeds = {"x": normal(2, 4, seed=2)}
    wanted = activations(ir.to_proto(net), feeds)
    with StagedRun(net, [feeds]) as run:
        for position in range(len(run.nodes) + 1):
            run.advance(position)
            (held,) = run.batches()
            if position in (2, 3):
                assert "a" in held
            for name, array in {**held, **run.rest().run(held)}.items():
                np.testing.assert_allclose(array, wanted[name], rtol=1e-6, atol=1e-6)


def test_sequences_between_two_pieces() -> None:
    text = """agraph (float[N,4] x) => (float[N,8] y) {
        a = Relu(x)
        s = SequenceConstruct(a, x)
        b = Neg(a)
        y = ConcatFromSequence<axis=1>(s)
        unread = Neg(b)
    }"""
    net, feeds = parse(text), {"x": normal(2, 4)}
    with StagedRun(net, [feeds]) as run:
        for position in range(len(run.nodes) + 1):
            run.advance(position)
        (held,) = run.batches()
        assert np.array_equal(held["y"], np.concatenate([np.maximum(feeds["x"], 0), feeds["x"]], axis=1))


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_free_weights_are_given_anew_with_each_run() -> None:
    net = model()
    with StagedRun(net, batches(1)) as run:
        run.advance(1)
        piece = run.rest(free=["constant", "two"])
        assert {"constant", "two"} <= set(piece.inputs)
        (held,) = run.batches()
        for seed in (3, 4):
            trial = {"constant": normal(4, seed=seed), "two": np.array(seed, np.float32)}
            changed = parse(TEXT, w=normal(4, 4), **trial)
            wanted = activations(ir.to_proto(changed), batches(1)[0])
            np.testing.assert_allclose(piece.run({**held, **trial})["y"], wanted["y"], rtol=1e-5, atol=1e-5)


def test_a_free_value_may_be_computed_from_constants() -> None:
    net = model()
    with StagedRun(net, batches(1)) as run:
        piece = run.rest(free=["twice"])  # the Mul that makes it is left out, and what only it reads
        assert "twice" in piece.inputs
        assert not {"constant", "two"} & {*piece.inputs, *piece.initializers}
        (held,) = run.batches()
        found = piece.run({**held, "twice": 2 * normal(4, seed=1)})
        wanted = activations(ir.to_proto(net), batches(1)[0])
        np.testing.assert_allclose(found["y"], wanted["y"], rtol=1e-6, atol=1e-6)


def test_shifted_outputs_and_scaled_operands() -> None:
    net = model()
    shift, scale = normal(4, seed=7), normal(4, seed=8)
    subtraction = next(node for node in net.graph if node.op_type == "Sub")
    with StagedRun(net, batches(1)) as run:
        piece = run.rest(shifted={"a": "more", "c": "offset"}, scaled={(subtraction, 1): "factor"})
        (held,) = run.batches()
        found = piece.run({**held, "more": shift, "offset": -shift, "factor": scale})
    feeds = batches(1)[0]
    a = feeds["x"] @ normal(4, 4) + shift
    relu = np.maximum(a, 0)
    c = np.concatenate([relu[:, 2:], relu[:, :2]], axis=1) - shift
    np.testing.assert_allclose(found["early"], relu, rtol=1e-5, atol=1e-5)
    wanted = c * 2 * normal(4, seed=1) + a - feeds["z"] * scale
    np.testing.assert_allclose(found["y"], wanted, rtol=1e-5, atol=1e-5)


def test_a_piece_returns_what_is_asked_for_and_made() -> None:
    net = model()
    nodes = list(net.graph)
    piece = Piece(net, nodes[:3], ["a", "rest", "elsewhere", "a"])
    assert piece.outputs == ["a", "rest"]
    assert piece.inputs == ["x"]
    assert Piece(net, nodes[:3], ["elsewhere"]).run({}) == {}


def test_an_initializer_that_is_also_an_input() -> None:
    net = parse("agraph (float[N,4] x, float[4,4] w) => (float[N,4] y) { y = MatMul(x, w) }", w=normal(4, 4))
    with StagedRun(net, [{"x": normal(2, 4)}]) as run:
        run.advance(1)
        (held,) = run.batches()
        np.testing.assert_allclose(held["y"], normal(2, 4) @ normal(4, 4), rtol=1e-6)


# -- constants, errors ------------------------------------------------------------------------------------------------


def test_contents_of_constants() -> None:
    text = """agraph (float[N,4] x) => (float[N,4] y) {
        k = Constant<value = float[2] {1.5, -2.0}>()
        t = Transpose<perm=[1,0]>(w)
        half = Mul(t, s)
        both = Concat<axis=0>(k, k)
        m = MatMul(x, half)
        y = Add(m, both)
    }"""
    w, s = normal(4, 4), np.array(0.5, np.float32)
    net = parse(text, w=w, s=s)
    values = {value.name: value for node in net.graph for value in node.outputs}
    assert np.array_equal(constant_contents(net, net.graph.initializers["w"]), w)
    assert np.array_equal(constant_contents(net, values["k"]), np.array([1.5, -2], np.float32))
    assert np.array_equal(constant_contents(net, values["half"]), w.T * 0.5)
    assert np.array_equal(constant_contents(net, values["both"]), np.array([1.5, -2] * 2, np.float32))
    net.graph.initializers["s"].const_value = ir.tensor(np.array(2, np.float32))
    assert np.array_equal(constant_contents(net, values["half"]), w.T * 2)


def test_errors_say_what_onnx_runtime_says() -> None:
    net = parse("agraph (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", w=normal(4, 4))
    with (
        StagedRun(net, [{"x": normal(2, 5)}]) as run,
        pytest.raises(ModelError, match="cannot run the model"),
    ):
        run.advance(1)
    with pytest.raises(ModelError, match="cannot load the model"):
        make_session(b"no model")
    broken = parse("agraph (float[N,4] x) => (float[N,4] y) { y = local.Unknown(x) }")
    with (
        StagedRun(broken, [{"x": normal(2, 4)}]) as run,
        pytest.raises(ModelError, match="cannot load the model"),
    ):
        run.advance(1)
