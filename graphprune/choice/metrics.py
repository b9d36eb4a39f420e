"""Metrics: how good a network's outputs are, on labels or beside the outputs of the original."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from graphprune.calibration import Calibration
from graphprune.calibration.memory import require
from graphprune.errors import MetricError, ModelError, OptionError, said

Array = npt.NDArray[Any]
#: Outputs by name, samples along axis 0; an array of objects, one for each sample, where their shapes differ.
Outputs: TypeAlias = Mapping[str, Array]
#: Called with the number of samples that are done, and of all.
Progress: TypeAlias = Callable[[int, int], None]

#: Samples that are run at once where the model takes any number.
BATCH = 64


class Metric(Protocol):
    """A figure of merit; higher is better.

    Attributes:
        name: As users write it.
        needs_labels: It cannot do without labels.
    """

    name: str
    needs_labels: ClassVar[bool]

    def __call__(self, outputs: Outputs, reference: Outputs, labels: Array | None) -> float:
        """Judge a network.

        Args:
            outputs: Of the network.
            reference: Of the original, on the same samples.
            labels: Of these samples.

        Raises:
            MetricError: The outputs are none that it can judge.
        """


class Top1:
    """The part of the samples whose class is the one with the greatest score.

    Classes lie along the last axis of the first output or, where the labels' shape says so, along axis 1 (a label for
    each pixel). An integer output of the labels' shape holds the classes themselves. Negative labels are left out.
    """

    name = "top1"
    needs_labels: ClassVar[bool] = True

    def __call__(self, outputs: Outputs, reference: Outputs, labels: Array | None) -> float:
        if labels is None:
            raise MetricError(
                "the metric 'top1' needs labels: an array 'labels' beside the calibration inputs"
            )
        name, output = _first(outputs)
        true = np.asarray(labels)
        if true.ndim > 1 and true.shape[-1] == 1:
            true = true[..., 0]
        whole = np.equal(true, np.floor(true)) if true.dtype.kind in "iufb" else np.array(False)
        if not whole.all():
            raise MetricError(
                f"the metric 'top1' needs labels that are class numbers, these are {true.dtype}"
            )
        true = true.astype(np.int64)
        predicted, classes = self._classes(name, output, true)
        known = true >= 0
        if not known.any():
            raise MetricError("the metric 'top1' needs labels: all are negative, which means unknown")
        if classes is not None and int(true.max()) >= classes:
            raise MetricError(
                f"labels reach {int(true.max())}, but the output {name!r} has classes 0 to {classes - 1}"
            )
        return float(np.mean(predicted[known] == true[known]))

    @staticmethod
    def _classes(name: str, output: Array, labels: Array) -> tuple[Array, int | None]:
        if output.dtype.kind in "iu" and output.shape == labels.shape:
            return output, None
        for axis in (-1, 1):
            # A pooled feature map, [N, C, 1, 1], is squeezed.
            scores = output
            while axis == -1 and scores.ndim > labels.ndim + 1 and scores.shape[-1] == 1:
                scores = scores[..., 0]
            if scores.dtype == object or scores.ndim != labels.ndim + 1:
                continue
            if scores.shape[:axis] + (scores.shape[axis + 1 :] if axis == 1 else ()) == labels.shape:
                _several(name, scores.shape[axis])
                return _argmax(scores, axis), scores.shape[axis]
        raise MetricError(
            f"labels of shape {list(labels.shape)} do not fit the output {name!r} {list(output.shape)}, which must"
            " have one more axis, of classes"
        )


class Agreement:
    """The part of the samples for which the greatest score is where the original has it; needs no labels.

    Classes lie along the last axis of the first output, along axis 1 if it has 4 axes or more (``[N, C, H, W]``). An
    integer output is compared as it is.
    """

    name = "agreement"
    needs_labels: ClassVar[bool] = False

    def __call__(self, outputs: Outputs, reference: Outputs, labels: Array | None) -> float:
        name, _ = _first(outputs)
        equal = []
        for mine, original in _pairs(name, outputs, reference):
            if mine.dtype.kind in "iub":
                equal.append((mine == original).ravel())
                continue
            axis = 1 if mine.ndim >= 4 else -1
            _several(name, mine.shape[axis])
            equal.append((_argmax(mine, axis) == _argmax(original, axis)).ravel())
        return float(np.mean(np.concatenate(equal)))


class Cosine:
    """Cosine similarity of each sample's outputs, flattened, with the original's; the mean over samples and outputs.

    ``a . b / (|a| |b|)``; 1 where both are zero, 0 where one is, -1 where something is NaN or infinite. Integer
    outputs are left out if there are real ones.
    """

    name = "cosine"
    needs_labels: ClassVar[bool] = False

    def __call__(self, outputs: Outputs, reference: Outputs, labels: Array | None) -> float:
        real = [name for name, array in outputs.items() if _kind(array) in "fV"] or list(outputs)
        if not real:
            raise MetricError("the metric 'cosine' needs an output, the network has none")
        return float(np.mean([self._of_output(name, outputs, reference) for name in real]))

    @staticmethod
    def _of_output(name: str, outputs: Outputs, reference: Outputs) -> float:
        similar = []
        for mine, original in _pairs(name, outputs, reference):
            if _kind(mine) not in "fVbiu":
                raise MetricError(
                    f"the metric 'cosine' needs numbers; the output {name!r} holds {mine.dtype}"
                )
            a = mine.reshape(len(mine), -1).astype(np.float64)
            b = original.reshape(len(original), -1).astype(np.float64)
            with np.errstate(all="ignore"):
                # Divided by the greatest magnitude first: squares neither overflow nor vanish.
                a /= np.maximum(np.abs(a).max(axis=1, keepdims=True, initial=0), np.finfo(np.float64).tiny)
                b /= np.maximum(np.abs(b).max(axis=1, keepdims=True, initial=0), np.finfo(np.float64).tiny)
                norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
                cosine = np.einsum("nk,nk->n", a, b) / norms
            both_zero = ~a.any(axis=1) & ~b.any(axis=1)
            cosine[norms == 0] = 0
            cosine[both_zero] = 1
            cosine[~np.isfinite(cosine)] = -1
            similar.append(np.clip(cosine, -1, 1))
        return float(np.mean(np.concatenate(similar)))


class Custom:
    """A user's own function, ``f(outputs, reference, labels) -> float``, higher is better.

    It is imported under the name that the user gives, ``module:function`` or ``path/to/file.py:function``, with the
    current directory (or the file's) among the places to look in. Nothing is ever imported because a model says so.
    """

    needs_labels: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        """Import the function.

        Raises:
            OptionError: There is no such module or function, or the module raises.
        """
        self.name = name
        self.function = _import(name)

    def __reduce__(self) -> tuple[type[Custom], tuple[str]]:
        return Custom, (self.name,)  # imported again in another process

    def __call__(self, outputs: Outputs, reference: Outputs, labels: Array | None) -> float:
        try:
            value = self.function(outputs, reference, labels)
        except Exception as error:
            raise MetricError(f"the metric {self.name!r} raised {_said(error)}") from error
        try:
            number = float(cast(float, value))
        except (TypeError, ValueError) as error:
            raise MetricError(
                f"the metric {self.name!r} must return a number, it returned {type(value).__name__} {str(value)[:80]!r}"
            ) from error
        if not math.isfinite(number):
            raise MetricError(f"the metric {self.name!r} returned {number}")
        return number


#: Metrics by name.
METRICS: dict[str, type[Top1] | type[Agreement] | type[Cosine]] = {
    metric.name: metric for metric in (Top1, Agreement, Cosine)
}


def find_metric(name: str) -> Metric:
    """The metric of that name, or the function that ``module:function`` names.

    Raises:
        OptionError: There is none.
    """
    if name in METRICS:
        return METRICS[name]()
    if ":" in name:
        return Custom(name)
    raise OptionError(
        f"unknown metric {name!r}; there are {', '.join(METRICS)}, or your own as module:function"
    )


def evaluate(
    model: str | Path | bytes,
    calibration: Calibration,
    *,
    batch: int = BATCH,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, Array]:
    """Run a model on all samples, batch by batch; only the outputs are kept.

    Args:
        model: A path, or a serialized model without external data.
        calibration: The inputs.
        batch: Samples at once, unless the model fixes that.
        threads: That one run may use; 0 for all cores.
        progress: Called after each batch.

    Returns:
        By output name, samples along axis 0, wherever the model has them. Where samples differ in shape, a 1-d array
        of objects, one array for each; where an output has no axis for samples, one entry for each batch instead.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model, or an output is no tensor.
        OptionError: The inputs cannot be read, or the outputs do not fit into memory.
    """
    from graphprune.runtime import make_session

    session = make_session(model, threads=threads)
    names = [output.name for output in session.get_outputs()]
    read = {value.name for value in session.get_inputs()}
    parts: dict[str, list[Array]] = {name: [] for name in names}
    counts: list[int] = []
    for feed in calibration.batches(batch):
        try:
            results = session.run(names, {name: array for name, array in feed.items() if name in read})
        except Exception as error:
            raise ModelError(f"ONNX Runtime cannot run the model: {said(error)}") from error
        counts.append(_samples(feed, calibration))
        for name, result in zip(names, results, strict=True):
            if not isinstance(result, np.ndarray | np.generic):
                raise ModelError(f"output {name!r} is a {type(result).__name__}, which no metric can judge")
            parts[name].append(np.asarray(result))
        if len(counts) == 1:
            size = sum(part[0].nbytes for part in parts.values())
            require(
                2 * size * (calibration.samples // counts[0]),  # twice: in batches, and put together
                "what the network puts out for all calibration inputs",
                "take fewer samples",
            )
        if progress is not None:
            progress(sum(counts), calibration.samples)
    return {name: _joined(parts.pop(name), counts) for name in names}


def _samples(feed: Mapping[str, Array], calibration: Calibration) -> int:
    for name in calibration.inputs:
        return int(feed[name].shape[calibration.axes.get(name, 0)])
    return 1


def _joined(arrays: list[Array], counts: list[int]) -> Array:
    """What all batches put out, the axis of samples first: the first one that has as many entries as each batch."""
    ranks = {array.ndim for array in arrays}
    axes = range(min(ranks)) if len(ranks) == 1 else ()
    axis = next(
        (
            axis
            for axis in axes
            if all(array.shape[axis] == count for array, count in zip(arrays, counts, strict=True))
        ),
        None,
    )
    if axis is not None:
        arrays = [np.moveaxis(array, axis, 0) for array in arrays]
    shapes = {array.shape if axis is None else array.shape[1:] for array in arrays}
    if axis is not None and len(shapes) == 1:
        return np.concatenate(arrays)
    items = arrays if axis is None else [sample for array in arrays for sample in array]
    if len(shapes) == 1:
        return np.stack(items)
    mixed = np.empty(len(items), dtype=object)
    mixed[:] = items
    return mixed


# -- what metrics share -----------------------------------------------------------------------------------------------


def _first(outputs: Outputs) -> tuple[str, Array]:
    if not outputs:
        raise MetricError("the network has no output to judge")
    return next(iter(outputs.items()))


def _kind(array: Array) -> str:
    return str(array[0].dtype.kind) if array.dtype == object and len(array) else str(array.dtype.kind)


def _pairs(name: str, outputs: Outputs, reference: Outputs) -> Iterator[tuple[Array, Array]]:
    """An output and the original's, some megabytes at a time; sample by sample where shapes differ."""
    mine, original = outputs[name], reference.get(name)
    if original is None or mine.shape != original.shape:
        shown = "nothing" if original is None else str(list(original.shape))
        raise MetricError(f"the output {name!r} is {list(mine.shape)}, that of the original {shown}")
    if not len(mine):
        raise MetricError(f"the output {name!r} holds no samples")
    if mine.dtype != object:
        step = max(1, (1 << 24) // max(1, mine.nbytes // len(mine)))
        for start in range(0, len(mine), step):
            yield mine[start : start + step], original[start : start + step]
        return
    for one, other in zip(mine, original, strict=True):
        if one.shape != other.shape:
            raise MetricError(
                f"the output {name!r} has a sample of shape {list(one.shape)}, the original's is {list(other.shape)}"
            )
        yield one[None], other[None]


def _several(name: str, classes: int) -> None:
    if classes < 2:
        raise MetricError(
            f"the output {name!r} has one score for a sample, not one for each class: use the metric cosine,"
            " or your own as module:function"
        )


def _argmax(scores: Array, axis: int) -> Array:
    """The class with the greatest score; -1, which is no class, where a score is NaN."""
    real = scores.astype(np.float32) if scores.dtype.kind == "V" else scores
    found = np.argmax(real, axis=axis)
    return np.where(np.isnan(real).any(axis=axis), -1, found)


# -- functions of users -----------------------------------------------------------------------------------------------


def _import(name: str) -> Callable[..., object]:
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise OptionError(f"the metric {name!r} is not of the form module:function")
    try:
        if module_name.endswith(".py"):
            module = _import_file(Path(module_name))
        else:
            with _looking_in(Path.cwd()):
                module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise OptionError(f"the metric {name!r} cannot be imported: {_said(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "there is no" if function is None else "not callable is"
        raise OptionError(f"the metric {name!r} cannot be used: {what} {function_name!r} in {module_name!r}")
    return cast(Callable[..., object], function)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    name = f"graphprune_metric_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    with _looking_in(path.resolve().parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _looking_in(folder: Path) -> Iterator[None]:
    """Modules in the folder can be imported meanwhile."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _said(error: BaseException) -> str:
    """The error's type and what it says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
