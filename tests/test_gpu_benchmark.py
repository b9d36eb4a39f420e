"""benchmarks/gpu.py without a GPU: sizes, report, detection, and what it does with the answers of its processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu, gpu_layers, gpu_networks, gpu_products, gpu_report, gpu_sessions
from graphprune.errors import EngineError
from graphprune.tensorrt import bench, build, engines
from graphprune.tensorrt.engines import EngineRun
from graphprune.tensorrt.workers.engine import Device

from .test_sparsify import network
from .test_tensorrt_build import STAND_INS
from .test_tensorrt_engines import Driver

ROOT = Path(__file__).resolve().parent.parent
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


# -- sizes ----------------------------------------------------------------------------------------------------------


def test_resnet50_has_the_known_layers_parameters_and_arithmetic() -> None:
    """53 convolutions and a linear layer; 25,557,032 parameters less those of BatchNorm and the bias; 4.09 G MACs."""
    layers = gpu_layers.resnet50()
    assert sum(layer.count for layer in layers) == 54
    assert sum(layer.parameters for layer in layers) == 25_557_032 - 53_120 - 1000
    assert sum(layer.macs for layer in layers) == pytest.approx(4.09e9, rel=0.002)
    assert len({(layer.m, layer.k, layer.positions) for layer in layers}) == len(layers)


def test_minilm_has_the_known_parameters() -> None:
    layers = gpu_layers.minilm()
    assert sum(layer.parameters for layer in layers) == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert sum(layer.count for layer in layers) == 36
    assert {layer.positions for layer in gpu_layers.minilm(64)} == {64}


def test_all_products() -> None:
    found = gpu_layers.products([1, 32])
    assert [layer.m for layer, n in found if layer.network == "square"] == [256, 512, 1024, 2048, 4096, 8192]
    of_fc = {n for layer, n in found if layer.name == "fc"}
    assert of_fc == {1, 32}


# -- report ---------------------------------------------------------------------------------------------------------


def product(**changes: Any) -> dict[str, Any]:
    row = {
        "network": "resnet50",
        "layer": "fc",
        "count": 2,
        "batch": 1,
        "m": 8,
        "k": 16,
        "n": 1,
        "dtype": "float16",
    }
    return {**row, **changes}


def test_the_empty_report_says_so_and_holds_no_figure(tmp_path: Path) -> None:
    assert gpu.main(["--empty", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["products"] == document["networks"] == []
    text = (tmp_path / "gpu.md").read_text()
    assert gpu_report.NEVER in text
    cells = [
        cell.strip()
        for line in text.splitlines()
        if line.startswith("|") and "–" in line
        for cell in line.strip("|").split("|")
    ]
    assert set(cells) == {"–"}
    assert len(cells) == sum(map(len, (gpu_report.TOTALS, gpu_report.NETWORKS))) + 3 * len(
        gpu_report.PRODUCTS
    )


def test_the_committed_report_is_the_scripts_own() -> None:
    folder = ROOT / "benchmarks" / "results"
    assert (folder / "gpu.md").read_text() == gpu_report.markdown(
        json.loads((folder / "gpu.json").read_text())
    )


def test_a_report_with_figures() -> None:
    answer = {
        "dense_us": [8.0, 8.0, 50.0],
        "sparse_us": [5.0, 4.0, 5.0],
        "error": 2e-4,
        "kernel": "searched (3)",
    }
    rows = [
        gpu.product_result(product(), answer, graph=True),
        gpu.product_result(product(layer="stem", k=147), {"reason": "4 does not divide k = 147"}, graph=True),
        gpu.product_result(product(network="square"), {**answer, "sparse_us": [7.9]}, graph=False),
    ]
    network = gpu_networks.timed(
        Path("net.onnx"), "TensorRT", ["original", "pruned"], [["FLOAT16"]] * 2, [[4.0], [2.0]]
    )
    text = gpu_report.markdown(
        {
            "command": "c",
            "machine": {"GPU": "a|b"},
            "versions": {"torch": "2"},
            "found": [],
            "products": rows,
            "networks": [*network, gpu_networks.failed(Path("other.onnx"), "TensorRT", "no such op")],
        }
    )
    assert gpu_report.NEVER not in text
    assert (
        "| fc | 2 | 8 x 16 x 1 | float16 | 8.0 | 5.0 | 1.60 | 1.60 times as fast | 2.0e-04 | graph |" in text
    )
    assert "no difference (below 3%) | 2.0e-04 | launches |" in text
    assert "4 does not divide k = 147" in text
    assert (
        "| resnet50 | 1 | float16 | 2 | 16.0 | 10.0 | 1.60 | 2 |" in text
    )  # counted twice each; two not taken
    assert "| net.onnx | TensorRT | pruned | FLOAT16 | 2.0000 | 2.00 times as fast |" in text
    assert "| other.onnx | TensorRT | all |  |  |  |  | no such op |" in text


# -- what is there --------------------------------------------------------------------------------------------------


def test_on_a_bare_machine_it_lists_what_is_missing_and_ends_well(tmp_path: Path) -> None:
    """An interpreter without any package: not even NumPy."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "net.onnx", "--out", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(STAND_INS / "empty")},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for name in ("PyTorch", "TensorRT", "ONNX Runtime, CUDA", "graphprune's own needs"):
        assert f"| {name} | not there |" in done.stdout
    assert "not installed: numpy, onnx" in done.stdout
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("program", "states", "said"),
    [
        ('print(\'{"version": "2.9", "device": [9, 0], "cusparselt": 801}\')', ["there", "there"], None),
        (
            'print(\'{"version": "2.9", "device": [7, 5], "cusparselt": 801}\')',
            ["there", "not there"],
            "Ampere",
        ),
        (
            'print(\'{"version": "2.9", "device": null, "cusparselt": null}\')',
            ["there", "not there"],
            "no CUDA",
        ),
        (
            'print(\'{"version": "2.9", "device": [8, 0], "cusparselt": null}\')',
            ["there", "not there"],
            "without",
        ),
        ("raise ImportError('no libcudart')", ["not there", "not there"], "no libcudart"),
        ("import os; os.abort()", ["not there", "not there"], "does not start"),
        ("import time; time.sleep(60)", ["not there", "not there"], "within 2 s"),
    ],
)
def test_pytorch_is_asked_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, program: str, states: list[str], said: str | None
) -> None:
    monkeypatch.setattr(gpu, "TORCH", program)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    found = gpu.find_torch(2.0)
    assert [entry["state"] for entry in found] == states
    if said is not None:
        assert any(said in (entry["reason"] or "") for entry in found)


def test_the_command_names_no_folder(tmp_path: Path) -> None:
    options = gpu.parse(
        [str(tmp_path / "net.onnx"), "--shapes", "x:1x3", "--calib", str(tmp_path / "in.npz")]
    )
    command = gpu.command_of(options)
    assert str(tmp_path) not in command
    assert "net.onnx" in command
    assert "--shapes x:1x3 --calib in.npz" in command


# -- products -------------------------------------------------------------------------------------------------------


def test_a_process_that_dies_costs_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    good = {"dense_us": [2.0], "sparse_us": [1.0], "error": 0.0, "kernel": "default"}

    def child(script: str, question: dict[str, Any], limit: float) -> tuple[list[Any], str | None]:
        asked.append(question)
        if len(asked) == 1:
            return [{"reason": "capture is not allowed"}], None
        answers: list[Any] = []
        for wanted in question["products"]:
            if wanted["layer"] == "512":
                return answers, "the process ended with status -11"
            answers.append(good)
        return answers, None

    monkeypatch.setattr(gpu, "child", child)
    squares = [(layer, layer.positions) for layer in gpu_layers.squares()[:3]]
    rows = gpu.time_products(squares, ["float16"], 3, 5.0)
    assert [row["reason"] for row in rows] == [None, "the process ended with status -11", None]
    assert [len(question["products"]) for question in asked] == [1, 3, 1]
    assert not asked[1]["graph"]  # the trial could not be captured
    assert rows[0]["timed_by"] == "launches"
    assert rows[0]["said"] == "2.00 times as fast"


def test_children_answer_by_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answers.py").write_text(
        "import sys\nfile = open(sys.argv[2], 'w')\n"
        "file.write('{\"a\": 1}\\n{\"a\"')\nfile.flush()\nsys.exit('broken')\n"
    )
    monkeypatch.setattr(gpu_networks, "HERE", tmp_path)
    answers, failure = gpu_networks.child("answers.py", {}, 20)
    assert answers == [{"a": 1}]
    assert failure == "the process ended with status 1: broken"
    (tmp_path / "answers.py").write_text("import time; time.sleep(60)")
    assert gpu_networks.child("answers.py", {}, 0.5) == ([], "the process did not end within 0.5 s")


def test_weights_are_halved_along_what_is_summed() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    weight = torch.randn(6, 32)
    found = gpu_products.halve(torch, weight)
    groups = found.reshape(6, 8, 4)
    assert ((groups != 0).sum(-1) == 2).all()
    assert torch.equal(found[found != 0], weight[found != 0])
    kept = weight.reshape(6, 8, 4).abs().sort(-1).values[..., 2:].sum()
    assert torch.isclose(groups.abs().sum(), kept)


def test_stretches_are_long_enough_to_time() -> None:
    """Against a device whose clock goes on by 50 microseconds a call."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Torch:
        class cuda:  # noqa: N801
            pass

    Torch.cuda.Event = Event  # type: ignore[attr-defined]

    def call() -> None:
        clock[0] += 0.05

    run, count = gpu_products.stretch(Torch, call, graph=False)
    assert count in (39, 40)
    assert gpu_products.milliseconds(Torch, run) == pytest.approx(count * 0.05)


# -- networks -------------------------------------------------------------------------------------------------------


class Value:
    """An array that says that it lies on the device."""

    def __init__(self, array: Any) -> None:
        self.array = array


class Runtime:
    """ONNX Runtime as far as sessions on the device use it: each takes a time of its own."""

    def __init__(self, driver: Driver, providers: list[str]) -> None:
        self.made: list[Any] = []
        outer = self

        class Session:
            def __init__(self, path: str, providers: list[Any]) -> None:
                self.path, self.asked = path, providers
                outer.made.append(self)

            def get_providers(self) -> list[str]:
                return providers

            def get_inputs(self) -> list[Any]:
                return [type("Input", (), {"name": "x"})]

            get_outputs = get_inputs

            def io_binding(self) -> Any:
                return type(
                    "Binding",
                    (),
                    {"bind_ortvalue_input": lambda *a: None, "bind_output": lambda *a: None},
                )()

            def run_with_iobinding(self, binding: Any) -> None:
                driver.clock += float(self.path)

        self.InferenceSession = Session
        self.OrtValue = type(
            "OrtValue", (), {"ortvalue_from_numpy": staticmethod(lambda a, kind, index: Value(a))}
        )


def test_sessions_are_timed_in_turn_on_our_stream() -> None:
    driver = Driver()
    runtime = Runtime(driver, [CUDA, CPU])
    models = [{"path": path, "providers": [[CUDA, {"a": "b"}], [CPU, {}]]} for path in ("4.0", "2.5")]
    asked = {"models": models, "rounds": 3, "runs": 2}
    times = gpu_sessions.measure(runtime, Device(driver), asked, {"x": np.zeros(1)})
    assert times[0] == pytest.approx([4.0] * 6)
    assert times[1] == pytest.approx([2.5] * 6)
    assert runtime.made[0].asked == [(CUDA, {"a": "b", "user_compute_stream": "0"}), (CPU, {})]


def test_a_session_that_falls_back_is_not_timed() -> None:
    driver = Driver()
    models = [{"path": "1.0", "providers": [[CUDA, {}], [CPU, {}]]}]
    with pytest.raises(RuntimeError, match="fell back to CPUExecutionProvider"):
        gpu_sessions.measure(
            Runtime(driver, [CPU]),
            Device(driver),
            {"models": models, "rounds": 1, "runs": 1},
            {"x": np.zeros(1)},
        )


@pytest.fixture
def asked(tmp_path: Path) -> gpu_networks.Asked:
    onnx.save(network(), tmp_path / "net.onnx")
    shapes = ["x:4x16x6x6"]
    return gpu_networks.Asked([tmp_path / "net.onnx"], 0.5, "fp16", shapes, None, 2, 3, 60.0)


def test_networks_through_tensorrt(asked: gpu_networks.Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Original, pruned, pruned with 2:4 weights: with dense kernels, and the last one with sparse ones too."""
    from graphprune.tensorrt.log import parse_log

    plans = []

    def build_engine(plan: Any, **more: Any) -> Any:
        plans.append(plan)
        Path(plan.engine).write_bytes(b"an engine")
        log = parse_log(
            "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b\n"
            "(Sparsity) Chose 1 layer(s) using sparse tactics: a\n"
        )
        return type("Built", (), {"engine": Path(plan.engine), "log": log, "layers": None})

    def run_engines(paths: Any, feeds: Any, *, rounds: int = 0, **more: Any) -> list[EngineRun]:
        import onnxruntime as ort

        session = ort.InferenceSession(plans[0].model, providers=[CPU])
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        return [
            EngineRun(str(p), outputs, (8.0 / 2**i,) * 3 if rounds else (), "10") for i, p in enumerate(paths)
        ]

    monkeypatch.setattr(build, "build_engine", build_engine)
    monkeypatch.setattr(bench, "build_engine", build_engine)
    monkeypatch.setattr(engines, "run_engines", run_engines)
    monkeypatch.setattr(bench, "run_engines", run_engines)
    rows = gpu_networks.run(asked, [gpu_networks.TENSORRT], lambda text: None)
    assert [(row["model"], row["reason"]) for row in rows] == [
        ("original, dense kernels only", None),
        ("pruned, dense kernels only", None),
        ("pruned, 2:4, dense kernels only", None),
        ("pruned, 2:4, sparse kernels allowed", None),
    ]
    assert [plan.sparsity for plan in plans] == [True, False, False, False]  # the sparse one is built first
    assert [row["milliseconds"] for row in rows] == [8.0, 4.0, 2.0, 1.0]
    assert all("FLOAT16" in row["types"] for row in rows)
    assert rows[-1]["note"].startswith("SPARSE_USED")
    assert "; error " in rows[-1]["note"]
    gpu_report.table(gpu_report.NETWORKS, map(gpu_report.network_row, rows))


def test_networks_through_onnx_runtime(asked: gpu_networks.Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.tensorrt import provider

    placed = {CUDA: 3, CPU: 1}
    session = type("Run", (), {"placed": placed})
    monkeypatch.setattr(provider, "run_session", lambda *a, **more: session)
    questions = []

    def child(script: str, question: Any, limit: float) -> tuple[list[Any], str | None]:
        questions.append(question)
        return [{"milliseconds": [[4.0], [3.0], [2.98]]}], None

    monkeypatch.setattr(gpu_networks, "child", child)
    rows = gpu_networks.run(asked, [gpu_networks.ORT_CUDA, gpu_networks.ORT_TENSORRT], lambda text: None)
    assert [row["model"] for row in rows[:3]] == ["original", "pruned", "pruned, 2:4"]
    assert rows[2]["against_previous"] == "no difference (below 3%)"
    assert rows[0]["note"] == f"3 nodes by {CUDA}, 1 nodes by {CPU}"
    assert questions[0]["inputs"] == ["x"]
    # the provider of TensorRT took no node: no figure
    assert [row["reason"] is None for row in rows] == [True, True, True, False]
    assert "TensorrtExecutionProvider took no node" in rows[3]["reason"]


def test_a_network_that_cannot_be_pruned_is_a_row_with_a_reason(
    asked: gpu_networks.Asked, tmp_path: Path
) -> None:
    (tmp_path / "net.onnx").write_bytes(b"no network")
    (row,) = gpu_networks.run(asked, [gpu_networks.TENSORRT], lambda text: None)
    assert "net.onnx, original" in row["reason"]
    with pytest.raises(EngineError):
        gpu_networks.variants(tmp_path / "net.onnx", tmp_path, asked)
