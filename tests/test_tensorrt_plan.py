"""The build plan, its profiles, and its script, which a stand-in for trtexec runs.

`python -m tests.test_tensorrt_plan` writes the files in tests/snapshots/tensorrt anew.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
from pathlib import Path

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graphprune.errors import ModelError, OptionError
from graphprune.tensorrt.plan import (
    MAJORS,
    BuildPlan,
    Precision,
    from_json,
    make_plan,
    network_precision,
    write_plan,
)
from graphprune.tensorrt.profiles import NetworkInput, Profile, check_profiles, network_inputs, parse_profile
from graphprune.tensorrt.script import shell_script, trtexec_options

SNAPSHOTS = Path(__file__).parent / "snapshots" / "tensorrt"
IMAGE = Profile("image", (1, 3, 224, 224), (8, 3, 224, 224), (16, 3, 224, 224))
PLANS = {
    f"{name}.{major}": BuildPlan(
        model="net.onnx",
        engine="net.plan",
        major=major,
        precision=precision,
        profiles=profiles,
        workspace=2048,
        timing_cache="net.plan.timing",
        layers="net.plan.layers.json",
    )
    for name, precision, profiles in (
        ("half", Precision(("FLOAT16", "FLOAT")), (IMAGE, Profile("size", (), (), ()))),
        ("quantized", Precision(("FLOAT",), quantized=True), ()),
    )
    for major in MAJORS
}


def golden(name: str) -> dict[Path, str]:
    """The two files of a plan, as they are to be."""
    return {
        SNAPSHOTS / f"{name}.trt.json": PLANS[name].to_json(),
        SNAPSHOTS / f"{name}.trt.sh": shell_script(PLANS[name], Path()),
    }


@pytest.mark.parametrize("name", PLANS)
def test_files_are_as_they_were(name: str) -> None:
    for path, text in golden(name).items():
        assert path.read_text() == text


@pytest.mark.parametrize("name", PLANS)
def test_json_is_read_back(name: str) -> None:
    assert from_json(PLANS[name].to_json()) == PLANS[name]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}', '{"format": 2}'])
def test_json_that_is_no_plan(text: str) -> None:
    with pytest.raises(OptionError, match="write it anew"):
        from_json(text)


# Options of trtexec that are about types: what each version reads, from its sampleOptions.cpp.
TYPE_OPTIONS = {"--fp16", "--bf16", "--int8", "--stronglyTyped", "--best", "--fp8"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("half.8", {"--fp16"}),
        ("half.10", {"--stronglyTyped"}),
        ("half.11", set()),
        ("quantized.8", {"--int8"}),
        ("quantized.10", {"--stronglyTyped"}),
        ("quantized.11", set()),
    ],
)
def test_types_by_version(name: str, expected: set[str]) -> None:
    assert TYPE_OPTIONS & set(trtexec_options(PLANS[name])) == expected


def test_sparsity_is_enabled_or_absent_and_never_forced() -> None:
    for plan in PLANS.values():
        assert "--sparsity=enable" in trtexec_options(plan)
        without = trtexec_options(dataclasses.replace(plan, sparsity=False))
        assert not any("sparsity" in option for option in without)
        assert "force" not in shell_script(plan, Path())


def test_a_float32_network_is_told_that_it_cannot_gain() -> None:
    plan = dataclasses.replace(PLANS["half.11"], precision=Precision(("FLOAT",)))
    (note,) = plan.notes
    assert "float32" in note
    assert dataclasses.replace(plan, sparsity=False).notes == ()
    assert PLANS["half.11"].notes == PLANS["quantized.11"].notes == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"major": 9}, "there are for 8, 10, 11"),
        ({"workspace": 0}, "workspace"),
        ({"major": 8, "precision": Precision(("BFLOAT16",))}, "no bfloat16"),
        ({"engine": "./net.onnx"}, "another name"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        dataclasses.replace(PLANS["half.10"], **changes)  # type: ignore[arg-type]


# profiles


def test_profile_is_read() -> None:
    assert parse_profile("image:1x3x224x224,8x3x224x224,16x3x224x224") == IMAGE
    assert parse_profile("a:0:1x4") == Profile("a:0", (1, 4), (1, 4), (1, 4))
    assert parse_profile("odd, name:1,2,3") == Profile("odd, name", (1,), (2,), (3,))


@pytest.mark.parametrize(
    "text", ["", "image", "image:", ":1x3", "x:1,2", "x:1,2,3,4", "x:1x,2,3", "x:-1,2,3", "x:1.5", "x:ax3"]
)
def test_profile_of_another_form(text: str) -> None:
    with pytest.raises(OptionError, match="not of the form"):
        parse_profile(text)


INPUTS = (
    NetworkInput("image", "FLOAT", ("batch", 3, 224, 224)),
    NetworkInput("mask", "BOOL", (1, 4)),
    NetworkInput("any", "FLOAT", None),
)
ANY = Profile("any", (1,), (1,), (1,))


@pytest.mark.parametrize(
    ("given_shapes", "said"),
    [
        ([], "'image' has a dynamic shape (batch x 3 x 224 x 224)"),
        ([IMAGE], "'any' has a dynamic shape (unknown)"),
        ([IMAGE, ANY, Profile("picture", (1,), (1,), (1,))], "no such input; it has 'image', 'mask', 'any'"),
        ([IMAGE, IMAGE], "given twice"),
        (
            [Profile("image", (8, 3, 224, 224), (4, 3, 224, 224), (16, 3, 224, 224))],
            "dimension 0 goes 8, 4, 16",
        ),
        (
            [Profile("image", (1, 3, 224, 224), (9, 3, 224, 224), (8, 3, 224, 224))],
            "dimension 0 goes 1, 9, 8",
        ),
        ([Profile("image", (1, 3), (1, 3), (1, 3))], "2 dimensions, and the network's input has 4"),
        ([Profile("image", (1, 3), (1, 3, 224, 224), (1, 3))], "different numbers of dimensions"),
        (
            [Profile("image", (1, 3, 112, 224), (1, 3, 224, 224), (1, 3, 224, 224))],
            "dimension 2 is 224 in the",
        ),
    ],
)
def test_profiles_that_do_not_fit(given_shapes: list[Profile], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_profiles(INPUTS, given_shapes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_profiles_come_in_the_networks_order() -> None:
    assert check_profiles(INPUTS, [ANY, IMAGE]) == (IMAGE, ANY)
    assert check_profiles(INPUTS[1:2], []) == ()


def network(dtype: int, *, quantized: bool = False) -> ir.Model:
    """Input * weight, with a dynamic batch, the weight listed among the inputs as in old files."""
    weight = helper.make_tensor("w", dtype, (4, 2), [0.0] * 8)
    scale = helper.make_tensor("s", TensorProto.FLOAT, (), [1.0])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if quantized:
        nodes.append(helper.make_node("QuantizeLinear", ["y", "s"], ["q"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", dtype, ("n", None, 4)),
            helper.make_tensor_value_info("w", dtype, (4, 2)),
        ],
        [helper.make_tensor_value_info("q" if quantized else "y", TensorProto.UNDEFINED, None)],
        [weight, scale],
    )
    return ir.from_proto(helper.make_model(graph))


def test_plan_of_a_network() -> None:
    model = network(TensorProto.FLOAT16)
    assert network_inputs(model) == (NetworkInput("x", "FLOAT16", ("n", None, 4)),)
    assert network_precision(model) == Precision(("FLOAT16", "FLOAT"))
    assert network_precision(network(TensorProto.FLOAT, quantized=True)) == Precision(
        ("FLOAT",), quantized=True
    )
    plan = make_plan(model, "a.onnx", "a.plan", major=10, shapes=[parse_profile("x:1x1x4,2x8x4,4x8x4")])
    assert (plan.timing_cache, plan.layers) == ("a.plan.timing", "a.plan.layers.json")
    assert plan.profiles[0].usual == (2, 8, 4)
    with pytest.raises(OptionError, match=r"'x' has a dynamic shape \(n x \? x 4\)"):
        make_plan(model, "a.onnx", "a.plan")


# the script, run

ODD = 'a b\'s "$(touch owned)" `x` \\ ;&|<>*?~ é #'


def run_script(
    plan: BuildPlan, folder: Path, stand_in: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Write a plan beside its files and run its script with a stand-in for trtexec; its arguments come back."""
    program = folder / "stand in"
    program.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" >arguments\n{stand_in}\n")
    program.chmod(0o755)
    _, script = write_plan(plan, folder / "net")
    environment = {**os.environ, "TRTEXEC": str(program)}
    done = subprocess.run(
        [str(script)], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    return done, (folder / "arguments").read_text().split("\0")[:-1]


BUILD = """
for option; do case $option in --saveEngine=*) echo engine >"${option#--saveEngine=}";; esac; done
echo '[01/01/2026-00:00:00] [V] [TRT] (Sparsity) Found 2 layer(s) eligible to use sparse tactics'
echo '[01/01/2026-00:00:01] [V] [TRT] (Sparsity) Chose 1 layer(s) using sparse tactics' >&2
"""


def test_script_builds_beside_itself(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    plan = BuildPlan(
        model=str(folder / f"~{ODD}.onnx"),
        engine=str(folder / f"-{ODD}.plan"),
        major=10,
        precision=Precision(("FLOAT16",)),
        profiles=(Profile('in:0 $x "y" \\', (1, 4), (2, 4), (3, 4)),),
        timing_cache=str(tmp_path / "elsewhere"),
    )
    done, arguments = run_script(plan, folder, BUILD)
    assert done.returncode == 0, done.stderr
    assert arguments[0] == f"--onnx=./~{ODD}.onnx"
    assert arguments[1] == f"--saveEngine=./-{ODD}.plan.partial"
    assert '--minShapes=in:0 $x "y" \\:1x4' in arguments
    assert '--maxShapes=in:0 $x "y" \\:3x4' in arguments
    assert f"--timingCacheFile={tmp_path / 'elsewhere'}" in arguments
    assert (folder / f"-{ODD}.plan").read_text() == "engine\n"
    assert not (folder / f"-{ODD}.plan.partial").exists()
    assert done.stdout.splitlines()[-1].endswith("Chose 1 layer(s) using sparse tactics")
    assert "Found 2 layer(s)" in (folder / f"-{ODD}.plan.log").read_text()
    assert not list(tmp_path.rglob("owned"))


def test_script_of_a_build_that_fails(tmp_path: Path) -> None:
    plan = dataclasses.replace(
        PLANS["half.11"], model=str(tmp_path / "net.onnx"), engine=str(tmp_path / "net.plan")
    )
    (tmp_path / "net.plan").write_text("the engine before")
    done, _ = run_script(plan, tmp_path, BUILD + "exit 3")
    assert done.returncode == 3
    assert (tmp_path / "net.plan").read_text() == "the engine before"
    assert not (tmp_path / "net.plan.partial").exists()


def test_script_says_when_the_log_has_nothing(tmp_path: Path) -> None:
    plan = dataclasses.replace(
        PLANS["half.11"], model=str(tmp_path / "net.onnx"), engine=str(tmp_path / "net.plan")
    )
    done, _ = run_script(plan, tmp_path, 'echo >"net.plan.partial"')
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "nothing: look at net.plan.log"


paths = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=20
).filter(lambda text: text not in {".", ".."})


@settings(max_examples=40)
@given(paths, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0,'\n"), min_size=1))
def test_any_name_reaches_trtexec_as_it_is(file: str, name: str) -> None:
    plan = BuildPlan(
        model=f"/folder/{file}",
        engine="/folder/engine of the test",
        major=11,
        precision=Precision(("FLOAT16",)),
        profiles=(Profile(name, (1,), (2,), (3,)),),
    )
    script = shell_script(plan, Path("/folder"))
    call = script[script.index('"${TRTEXEC') : script.index(" 2>&1 |")].replace(
        '"${TRTEXEC:-trtexec}"', "printf '%s\\0'"
    )
    done = subprocess.run(["bash", "-c", call], capture_output=True, check=True)
    arguments = done.stdout.decode().split("\0")
    assert arguments[0].removeprefix("--onnx=").removeprefix("./") == file
    assert f"--optShapes={name}:2" in arguments
    assert all(
        line.startswith("#") for line in script.splitlines()[:5] if "trtexec" in line or "Builds" in line
    )


@pytest.mark.parametrize("name", ["a,b", "it's", "a\nb"])
def test_names_that_trtexec_cannot_be_given(name: str) -> None:
    plan = dataclasses.replace(PLANS["half.11"], profiles=(Profile(name, (1,), (1,), (1,)),))
    with pytest.raises(OptionError, match="rename the input"):
        trtexec_options(plan)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    plan, script = write_plan(PLANS["half.10"], tmp_path / "net")
    assert (plan.name, script.name) == ("net.trt.json", "net.trt.sh")
    assert stat.S_IMODE(script.stat().st_mode) == 0o755
    assert from_json(plan.read_text()) == PLANS["half.10"]
    with pytest.raises(ModelError, match="cannot be written"):
        write_plan(PLANS["half.10"], tmp_path / "no folder" / "net")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.trt.json", "net.trt.sh"]


if __name__ == "__main__":
    for key in PLANS:
        for target, contents in golden(key).items():
            target.write_text(contents)
