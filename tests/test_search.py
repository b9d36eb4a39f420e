"""Searches: a latency by an injected measurer, a drop of accuracy on real digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphprune
from graphprune.calibration import Calibration
from graphprune.choice.budget import Budget
from graphprune.choice.search import LATENCY_TOLERANCE, Drop, plan_for_latency, split
from graphprune.cli import main
from graphprune.cost import macs
from graphprune.costs import MacsCost
from graphprune.errors import BudgetError, MetricError, OptionError
from graphprune.model import as_ir, to_proto
from graphprune.plan import Plan
from graphprune.pruning import Pruning
from graphprune.settings import Settings

from .activations import Array, activations

MODELS = Path(__file__).parents[1] / "models"
DIGITS = MODELS / "digits.onnx"


@pytest.fixture(scope="module")
def digits() -> tuple[dict[str, Array], dict[str, Array]]:
    """Held-out digits in two halves: to measure and judge on, and to see whether that holds elsewhere."""
    data = np.load(MODELS / "digits_test.npz")
    images, labels = data["image"].astype(np.float32) / 16, data["label"].astype(np.int64)
    order = np.random.default_rng(0).permutation(len(images))
    first, second = order[:128], order[128:]
    return (
        {"image": images[first], "labels": labels[first]},
        {"image": images[second], "labels": labels[second]},
    )


def accuracy(model: Any, data: dict[str, Array]) -> float:
    logits = activations(to_proto(as_ir(model)[0]), {"image": data["image"]})["logits"]
    return float((logits.argmax(axis=1) == data["labels"]).mean())


# -- latency ----------------------------------------------------------------------------------------------------------


class Latency:
    """A pruning for a latency of which the tables are the multiply-accumulates."""

    def __init__(self, limit: float, truth: Callable[[float], float], blocks: int = 0) -> None:
        self.budget = Budget("latency", limit)
        settings = Settings(budget=self.budget, scope="local", blocks=blocks, repair=False)
        self.pruning = Pruning(as_ir(DIGITS)[0], settings, verify=False)
        self.cost = MacsCost(self.pruning.network)
        self.pruning.selection._costs["latency"] = self.cost
        self.truth = truth
        self.measured: list[float] = []

    def ratio(self, plan: Plan) -> float:
        pruned = self.pruning.cut(plan).report
        self.measured.append(self.truth(pruned.macs_after / pruned.macs_before))
        return self.measured[-1]

    def search(self) -> tuple[Plan, float, float]:
        return plan_for_latency(self.pruning, self.budget, self.ratio)


def test_a_latency_that_is_as_predicted_is_measured_once() -> None:
    search = Latency(0.6, lambda share: share)
    plan, predicted, measured = search.search()
    assert len(search.measured) == 1
    assert predicted == pytest.approx(measured, rel=1e-6)
    assert 0.5 < measured <= 0.6
    assert macs(search.pruning.network.analysis) * measured == pytest.approx(
        search.pruning.cut(plan).report.macs_after
    )


TRUTHS: dict[str, Callable[[float], float]] = {
    "overhead": lambda share: 0.3 + 0.7 * share,
    "faster than the tables say": lambda share: share**1.5,
    "slower than the tables say": math.sqrt,
}


@pytest.mark.parametrize("truth", TRUTHS)
def test_a_latency_is_corrected_by_measurements(truth: str) -> None:
    search = Latency(0.6, TRUTHS[truth])
    plan, predicted, measured = search.search()
    assert 0.6 * 0.85 < measured <= 0.6 * (1 + LATENCY_TOLERANCE)
    assert abs(measured - 0.6) == min(
        abs(m - 0.6) for m in search.measured if m <= 0.6 * (1 + LATENCY_TOLERANCE)
    )
    # What is returned belongs together.
    assert search.ratio(plan) == measured
    assert TRUTHS[truth](predicted) == pytest.approx(measured, rel=1e-6)


@pytest.mark.filterwarnings("ignore:blocks were measured on random inputs")
def test_a_latency_is_of_the_original_where_blocks_went_first() -> None:
    search = Latency(0.5, lambda share: share, blocks=1)
    _, predicted, measured = search.search()
    assert search.measured[0] < 0.9  # with the block gone, and nothing else
    assert len(search.measured) == 2  # the tables are right: one plan is enough
    assert predicted == pytest.approx(measured, rel=1e-6)
    assert 0.5 * 0.9 < measured <= 0.5
    plan, predicted, measured = Latency(0.95, lambda share: share, blocks=1).search()
    assert not plan.cuts  # that block was enough
    assert predicted == measured == search.measured[0]


def test_a_latency_that_cannot_be_reached_says_what_was() -> None:
    with pytest.raises(BudgetError, match=r"least that was measured is 0\.9"):
        Latency(0.6, lambda share: 0.9 + 0.1 * share).search()
    with pytest.raises(BudgetError, match="cannot be reached"):
        Latency(0.001, lambda share: share).search()


# -- accuracy ---------------------------------------------------------------------------------------------------------


def test_a_drop_holds_and_much_is_gone(digits: tuple[dict[str, Array], dict[str, Array]]) -> None:
    measured, elsewhere = digits
    small, report = graphprune.prune(str(DIGITS), max_drop=0.05, calibration=measured, verify=False)
    assert report.macs_after < 0.8 * report.macs_before
    assert report.repaired is not None
    # A quarter was held out; on others still the drop is about that: three standard errors.
    before, after = accuracy(str(DIGITS), elsewhere), accuracy(small, elsewhere)
    assert before - after <= 0.05 + 3 * math.sqrt(0.05 / len(elsewhere["labels"]))
    (note,) = (note for note in report.notes if note.startswith("metric:"))
    assert "32 samples held out" in note


def test_more_may_be_lost_more_goes(digits: tuple[dict[str, Array], dict[str, Array]]) -> None:
    """On inputs of their own, and exactly: the metric of what is returned is within the drop."""
    measured, judged = digits
    left = []
    for drop in (0.0, 0.6):
        small, report = graphprune.prune(
            str(DIGITS),
            max_drop=drop,
            calibration=measured,
            metric_data=judged,
            verify=False,
            score="l2",
            scope="local",
        )
        assert accuracy(str(DIGITS), judged) - accuracy(small, judged) <= drop + 1e-9
        left.append(report.macs_after)
    assert left[1] < left[0]


def test_where_no_cut_is_good_enough_it_says_so(
    digits: tuple[dict[str, Array], dict[str, Array]], tmp_path: Path
) -> None:
    """The search ends at a cut of nothing, which loses nothing, and is no answer."""
    metric = tmp_path / "strict.py"
    metric.write_text(
        "import numpy as np\n"
        "def judge(outputs, reference, labels):\n"
        "    return float(all(np.array_equal(outputs[n], reference[n]) for n in reference))\n"
    )
    with pytest.raises(
        BudgetError, match=r"no cut keeps .* within 0.5 of the original's 1; the mildest .* has 0"
    ):
        graphprune.prune(
            str(DIGITS),
            max_drop=0.5,
            metric=f"{metric}:judge",
            calibration=digits[0],
            verify=False,
            score="l2",
            scope="local",
        )


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_other_scopes(digits: tuple[dict[str, Array], dict[str, Array]], scope: str) -> None:
    measured, judged = digits
    small, report = graphprune.prune(
        str(DIGITS),
        max_drop=0.05,
        calibration=measured,
        metric_data=judged,
        scope=scope,
        score="l2",
        repair=False,
        verify=False,
    )
    assert accuracy(str(DIGITS), judged) - accuracy(small, judged) <= 0.05
    assert report.macs_after < report.macs_before


@pytest.mark.parametrize("how", ["jobs", "executor"])
def test_trials_run_elsewhere(digits: tuple[dict[str, Array], dict[str, Array]], how: str) -> None:
    measured, judged = digits
    options: dict[str, Any] = {
        "calibration": measured,
        "metric_data": judged,
        "verify": False,
        "score": "l2",
        "scope": "local",
    }
    if how == "jobs":
        small, report = graphprune.prune(str(DIGITS), max_drop=0.05, jobs=2, **options)
    else:
        submitted = []

        class Counting(ThreadPoolExecutor):
            def submit(self, *arguments: Any, **keywords: Any) -> Any:
                submitted.append(arguments)
                return super().submit(*arguments, **keywords)

        with Counting(2) as executor:
            small, report = graphprune.prune(str(DIGITS), max_drop=0.05, jobs=2, executor=executor, **options)
        assert submitted
    assert accuracy(str(DIGITS), judged) - accuracy(small, judged) <= 0.05
    assert report.macs_after < 0.9 * report.macs_before


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_metric_that_raises_leaves_no_file(
    jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text(
        "def judge(outputs, reference, labels):\n"
        "    if outputs is reference:\n"
        "        return 1.0\n"
        "    raise RuntimeError('planted')\n"
    )
    data = np.load(MODELS / "digits_test.npz")
    np.savez(tmp_path / "calib.npz", image=data["image"][:64].astype(np.float32) / 16)
    monkeypatch.chdir(tmp_path)
    there = sorted(path.name for path in tmp_path.iterdir())
    arguments = [
        str(DIGITS),
        "--max-drop",
        "0.1",
        "--metric",
        "bad.py:judge",
        "--calib",
        "calib.npz",
        "--score",
        "l2",
    ]
    code = main([*arguments, "--jobs", str(jobs), "-o", "small.onnx"])
    shown = capfd.readouterr().err
    assert (code, "planted" in shown) == (2, True), shown
    assert "Traceback" not in shown
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == there


def test_a_metric_that_needs_labels_says_so() -> None:
    data = np.load(MODELS / "digits_test.npz")
    inputs = {"image": data["image"][:64].astype(np.float32) / 16}
    with pytest.raises(MetricError, match="needs labels"):
        graphprune.prune(str(DIGITS), max_drop=0.1, metric="top1", calibration=inputs)


def test_inputs_are_split_without_overlap() -> None:
    inputs = Calibration({"x": np.arange(100)}, {}, labels=np.arange(100))
    ours, judged = split(inputs, 0)
    mine, theirs = (np.asarray(part.inputs["x"]) for part in (ours, judged))
    assert sorted([*mine, *theirs]) == list(range(100))
    assert (len(mine), len(theirs)) == (75, 25)
    assert ours.labels is not None
    assert np.array_equal(ours.labels, mine)
    assert np.array_equal(np.asarray(split(inputs, 0)[1].inputs["x"]), theirs)
    assert not np.array_equal(np.asarray(split(inputs, 1)[1].inputs["x"]), theirs)
    with pytest.raises(OptionError, match="7 calibration inputs are too few"):
        split(Calibration({"x": np.arange(7)}, {}), 0)


@pytest.mark.parametrize(("most", "jobs"), [(-0.1, 1), (float("nan"), 1), (0.1, 0)])
def test_drops_that_make_no_sense(most: float, jobs: int) -> None:
    with pytest.raises(OptionError):
        Drop(most, jobs=jobs)
