"""What build logs and inspectors say, and the verdict from it.

The texts follow what users of TensorRT 8, 10 and 11 show in public: the sources are named in graphprune/tensorrt/log.py
and inspector.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import ModelError
from graphprune.sparsity.report import WeightReport
from graphprune.tensorrt.inspector import is_sparse_tactic, parse_layers
from graphprune.tensorrt.log import Mention, Pair, parse_log
from graphprune.tensorrt.verdict import Verdict, judge

EIGHT = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec --onnx=sparse.onnx --sparsity=enable --fp16
[08/05/2024-12:06:40] [I] === Build Options ===
[08/05/2024-12:06:54] [I] [TRT] Total Activation Memory: 7864832
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) Layers eligible for sparse math: MatMul_401, Conv_619 + Relu_620, Conv_626
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: Conv_626
[08/05/2024-12:06:55] [I] [TRT] [MemUsageChange] TensorRT-managed allocation in building engine: CPU +0, GPU +512
&&&& PASSED TensorRT.trtexec [TensorRT v8601] # trtexec --onnx=sparse.onnx
"""
TEN = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v101600] [b40] # trtexec --onnx=net.onnx --stronglyTyped --sparsity=enable
[02/11/2026-09:01:12] [V] [TRT] (Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b + c, d
[02/11/2026-09:01:13] [V] [TRT] (Sparsity) Chose 0 layer(s) using sparse tactics
[02/11/2026-09:01:14] [I] [TRT] Compiler backend is used during engine build.
[02/11/2026-09:01:20] [V] [TRT] (Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b + c, d
[02/11/2026-09:01:21] [V] [TRT] (Sparsity) Chose 2 layer(s) using sparse tactics: a, b + c
"""
ELEVEN = """\
[07/07/2026-14:42:10] [TRT] [V] (Sparsity) Found 39 layer(s) eligible to use sparse tactics
[07/07/2026-14:42:11] [TRT] [V] (Sparsity) Chose 0 layer(s) using sparse tactics
[07/07/2026-14:42:12] [TRT] [I] TensorRT version: 11.1.0
"""


def test_log_of_8() -> None:
    log = parse_log(EIGHT)
    assert log.pairs == (
        Pair(Mention(3, ("MatMul_401", "Conv_619 + Relu_620", "Conv_626")), Mention(1, ("Conv_626",))),
    )
    assert log.version == "8.6.1"


def test_log_of_10_the_last_pair_counts() -> None:
    log = parse_log(TEN)
    assert [pair.chosen.count for pair in log.pairs if pair.chosen] == [0, 2]
    assert log.last == Pair(Mention(3, ("a", "b + c", "d")), Mention(2, ("a", "b + c")))
    assert log.version == "10.16.0"


def test_log_of_11_has_counts_and_no_names() -> None:
    log = parse_log(ELEVEN)
    assert log.last == Pair(Mention(39), Mention(0))
    assert log.version == "11.1.0"


@pytest.mark.parametrize(
    ("prefix", "colour"),
    [
        ("[08/05/2024-12:06:54] [I] [TRT] ", ""),
        ("[08/05/2024-12:06:54] [TRT] [V] ", ""),
        ("[TensorRT] INFO: ", ""),
        ("[V] ", ""),
        ("2026-01-01 10:00:00,123 - build - INFO - ", ""),
        ("", ""),
        ("", "\x1b[38;5;10m"),
    ],
)
def test_prefixes_and_colours(prefix: str, colour: str) -> None:
    reset = "\x1b[0m" if colour else ""
    text = "\n".join(
        f"{colour}{prefix}(Sparsity) {line}{reset}"
        for line in (
            "Layers eligible for sparse math: Conv_0",
            "TRT inference plan picked sparse implementation for layers: ",
        )
    )
    assert parse_log(text).last == Pair(Mention(1, ("Conv_0",)), Mention(0))


def test_zero_found_in_both_formats() -> None:
    eight = (
        "[09/16/2022-09:55:37] [I] [TRT] (Sparsity) Layers eligible for sparse math: \n"
        "[09/16/2022-09:55:37] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: \n"
        "[09/16/2022-09:55:37] [I] [TRT] [MemUsageChange] TensorRT-managed allocation in building engine\n"
    )
    assert parse_log(eight).last == Pair(Mention(0), Mention(0))
    ten = "(Sparsity) Found 0 layer(s) eligible to use sparse tactics\n(Sparsity) Chose 0 layer(s) using sparse tactics"
    assert parse_log(ten).last == Pair(Mention(0), Mention(0))


def test_names_with_commas_are_told_apart_where_the_network_is_known() -> None:
    text = (
        "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv, first + relu, /a b/Conv\n"
        "(Sparsity) Chose 1 layer(s) using sparse tactics: conv, first + relu"
    )
    log = parse_log(text, known=["conv, first", "relu", "/a b/Conv"])
    assert log.last == Pair(
        Mention(2, ("conv, first + relu", "/a b/Conv")), Mention(1, ("conv, first + relu",))
    )
    unknown = parse_log(text).last
    assert unknown is not None
    assert unknown.eligible is not None
    assert unknown.eligible.count == 2
    assert not unknown.eligible.complete


def test_cut_logs() -> None:
    between = parse_log(TEN[: TEN.rindex("[02/11/2026-09:01:21]")])
    assert between.last == Pair(Mention(3, ("a", "b + c", "d")), None)
    within = parse_log(TEN[: TEN.rindex(" layer(s) using")])  # "(Sparsity) Chose 2"
    assert within.last == Pair(Mention(3, ("a", "b + c", "d")), None)
    names = parse_log("(Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b +")
    assert names.last == Pair(Mention(3, ("a", "b +"), complete=False))
    eight = parse_log("(Sparsity) Layers eligible for sparse math: Conv_1, Conv_2,")
    assert eight.last == Pair(Mention(2, ("Conv_1", "Conv_2"), complete=False))
    assert parse_log("").last is None
    assert parse_log("[I] [TRT] (Sparsity)").last is None


def test_a_terminal_wraps_lines() -> None:
    """As in NVIDIA/TensorRT issue 2169, where names are split between lines."""
    line = "[07/19/2022-11:58:20] [I] [TRT] (Sparsity) Layers eligible for sparse math: " + ", ".join(
        f"MatMul_{number}" for number in range(100, 130)
    )
    wrapped = "\n".join(line[start : start + 158] for start in range(0, len(line), 158))
    assert wrapped.count("\n") == 2
    after = "\n[07/19/2022-11:58:20] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers:"
    last = parse_log(wrapped + after).last
    assert last is not None
    assert last.eligible == Mention(30, tuple(f"MatMul_{number}" for number in range(100, 130)))
    assert last.chosen == Mention(0)


def test_messages_without_prefixes_are_not_taken_for_wrapped_names() -> None:
    text = "(Sparsity) Found 1 layer(s) eligible to use sparse tactics: a\nTotal Activation Memory: 7864832\n"
    last = parse_log(text).last
    assert last is not None
    assert last.eligible == Mention(1, ("a",))


def test_errors_are_kept() -> None:
    log = parse_log(
        "[11/21/2026-10:00:00] [E] Error[4]: In node 3 with name: c and operator: Conv (parseNode): INVALID_NODE\n"
        "[11/21/2026-10:00:00] [TRT] [E] second\n[TensorRT] ERROR: third\n"
    )
    assert [text.split()[0] for text in log.errors] == ["Error[4]:", "second", "third"]


# the line feeds of str.splitlines, and what the log itself gives a meaning, cannot stand in names
names = st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters=",()+"), min_size=1, max_size=12
)


@given(st.lists(names, min_size=1, max_size=8), st.lists(names, max_size=3), st.sampled_from(["8", "10"]))
def test_what_is_written_is_read(eligible: list[str], chosen: list[str], version: str) -> None:
    heads = {
        "8": (
            "Layers eligible for sparse math: ",
            "TRT inference plan picked sparse implementation for layers: ",
        ),
        "10": (
            f"Found {len(eligible)} layer(s) eligible to use sparse tactics: ",
            f"Chose {len(chosen)} layer(s) using sparse tactics: ",
        ),
    }[version]
    text = "".join(
        f"[01/02/2026-03:04:05] [I] [TRT] (Sparsity) {head}{', '.join(listed)}\n"
        for head, listed in zip(heads, (eligible, chosen), strict=True)
    )
    assert parse_log(text).last == Pair(
        Mention(len(eligible), tuple(eligible)), Mention(len(chosen), tuple(chosen))
    )


def layer(name: str, tactic: str, metadata: str = "", **fields: object) -> dict[str, object]:
    return {
        "Name": name,
        "LayerType": "CaskConvolution",
        "TacticName": tactic,
        "Metadata": metadata,
        **fields,
    }


SPARSE_TACTIC = (
    "sm80_xmma_fprop_sparse_conv_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x64x64_sptensor16x8x32"
)
DENSE_TACTIC = "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize64x64x64_tensor16x8x16"
ENGINE = json.dumps(
    {
        "Layers": [
            layer(
                "conv1 + relu1",
                SPARSE_TACTIC,
                "[ONNX Layer: conv1]\x1e[ONNX Layer: relu [1]]\x1e",
                HasSparseWeights=1,
                Weights={"Type": "Half", "Count": 36864},
            ),
            layer("conv2", DENSE_TACTIC, HasSparseWeights=0, Weights={"Type": "Half", "Count": 4}),
            layer("fc_myl0_3", "__myelin_CASK_STUB", "[ONNX Layer: /fc/Gemm][ONNX Layer: /fc/Relu]"),
            {
                "Name": "reformat",
                "LayerType": "Reformat",
                "TacticValue": "0x00000000000003e8",
                "Metadata": "",
            },
        ],
        "Bindings": ["x", "y"],
    }
)


def test_layers_of_a_detailed_engine() -> None:
    engine = parse_layers(ENGINE)
    assert engine.detailed
    assert [layer.sparse for layer in engine.layers] == [True, False, None, None]
    assert [layer.sparse_weights for layer in engine.layers] == [True, False, None, None]
    assert engine.layers[0].nodes == ("conv1", "relu [1]")
    assert engine.layers[1].nodes == ("conv2",)
    assert engine.layers[2].nodes == ("/fc/Gemm", "/fc/Relu")
    assert engine.layers[0].weights == "Half"
    assert [layer.name for layer in engine.sparse] == ["conv1 + relu1"]


def test_layers_of_an_engine_without_details() -> None:
    """As in NVIDIA/TensorRT issue 4020: names only."""
    engine = parse_layers('{"Layers": ["conv1 + relu1","fc"],"Bindings": ["x"]}')
    assert not engine.detailed
    assert engine.layers[0].nodes == ("conv1", "relu1")
    assert engine.layers[0].sparse is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": []}', "&&&& RUNNING", '{"Layers": {}}'])
def test_layer_information_that_is_none(text: str) -> None:
    with pytest.raises(ModelError, match="layer information"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("tactic", "sparse"),
    [
        (SPARSE_TACTIC, True),
        (
            "sm80_xmma_fprop_avdt_sparse_int8int8_tilesize64x64x64_tapsperload3_threadspercta128_r3s3_u1v1",
            True,
        ),
        ("sm80_xmma_sparse_gemm_f16f16_f16f32_f32_nt_n_tilesize128x128x64_stage3_sptensor16x8x32", True),
        ("cutlass_tensorop_h16832spgemm_128x128_64x3_nn_align8", True),
        (DENSE_TACTIC, False),
        ("sm80_xmma_fprop_avdt_dense_int8int8_tilesize64x64x64", False),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32", False),
        ("__myl_FcAdd_0xbff8932c8ee77edaa1ad1c7a4123caf9", None),
        ("__myelin_CASK_STUB", None),
        ("", None),
        (None, None),
    ],
)
def test_tactic_names(tactic: str | None, sparse: bool | None) -> None:
    assert is_sparse_tactic(tactic) is sparse


@dataclass(frozen=True)
class Weight:
    """The file's check of one weight."""

    name: str
    node: str
    holds: str | None = "2:4"
    eligible: bool = True
    reason: str | None = None
    dtype: str = "FLOAT16"
    unlikely: str | None = None


HALF = Weight("conv1.w", "conv1")
LOG = (
    "(Sparsity) Found {} layer(s) eligible to use sparse tactics: {}\n"
    "(Sparsity) Chose {} layer(s) using sparse tactics"
)


def test_sparse_kernels_in_the_engine_decide() -> None:
    judgement = judge([HALF], parse_log(LOG.format(2, "conv1 + relu1, conv2", 0)), parse_layers(ENGINE))
    assert judgement.verdict is Verdict.SPARSE_USED
    assert judgement.sparse == ("conv1 + relu1",)
    assert judgement.dense == ("conv2",)
    assert "the engine is what runs" in judgement.reason


def test_chosen_in_the_log_is_enough() -> None:
    judgement = judge([HALF], parse_log(TEN))
    assert (judgement.verdict, judgement.sparse, judgement.dense) == (
        Verdict.SPARSE_USED,
        ("a", "b + c"),
        ("d",),
    )
    assert (judgement.eligible, judgement.chosen, judgement.holding) == (3, 2, ("conv1.w",))


def test_eligible_and_not_chosen() -> None:
    judgement = judge([HALF], parse_log(LOG.format(1, "conv1", 0)))
    assert judgement.verdict is Verdict.ELIGIBLE_NOT_CHOSEN
    assert judgement.dense == ("conv1",)
    judgement = judge([HALF], parse_log(ELEVEN))
    assert judgement.verdict is Verdict.ELIGIBLE_NOT_CHOSEN
    assert "39 layers" in judgement.reason


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([HALF], "kept dense ones as faster"),
        ([Weight("w", "conv1", unlikely="64 x 64 is small")], "gained by all weights: 64 x 64 is small"),
        ([HALF, Weight("w", "n", unlikely="it is small")], "gained by 1 of 2 weights: it is small"),
        ([Weight("w", "conv1", dtype="INT8")], "quantize their outputs too"),
    ],
)
def test_why_dense_kernels_were_faster(weights: list[Weight], said: str) -> None:
    judgement = judge(weights, parse_log(LOG.format(1, "conv1", 0)))
    assert judgement.verdict is Verdict.ELIGIBLE_NOT_CHOSEN
    assert judgement.reason.endswith(said)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (None, "found no layer"),
        ([Weight("w", "n", holds=None)], "none of the file's 1 weight holds 2:4"),
        ([], "no weights"),
        ([Weight("w", "n", eligible=False, reason="12 outputs are no multiple of 8")], "12 outputs"),
        ([Weight("w", "n", dtype="FLOAT")], "1 weight holds 2:4 in float32"),
        ([HALF], "although 1 weight holds 2:4"),
    ],
)
def test_none_found_and_why(weights: list[Weight] | None, said: str) -> None:
    judgement = judge(weights, parse_log(LOG.format(0, "", 0)))
    assert judgement.verdict is Verdict.NOT_ELIGIBLE
    assert said in judgement.reason


@pytest.mark.parametrize("holds", [None, "dense", "3:4", "4:8", "2:8", "2:2", "12:4", ""])
def test_a_file_without_the_pattern_needs_no_build(holds: str | None) -> None:
    assert judge([Weight("w", "n", holds=holds)]).verdict is Verdict.NOT_ELIGIBLE


@pytest.mark.parametrize("holds", ["0:4", "1:4", "2:4", "1:2"])
def test_a_file_with_the_pattern_needs_one(holds: str) -> None:
    assert judge([Weight("w", "n", holds=holds)]).verdict is Verdict.UNKNOWN


def test_the_report_of_a_sparse_file_is_evidence() -> None:
    weight = WeightReport("w", "n", "MatMul", (4, 4), "FLOAT16", None, True, None, holds="2:4")
    judgement = judge([weight], parse_log(LOG.format(1, "n", 1)))
    assert (judgement.verdict, judgement.holding) == (Verdict.SPARSE_USED, ("w",))


def test_kernels_alone() -> None:
    dense = parse_layers(json.dumps({"Layers": [layer("conv1", DENSE_TACTIC), layer("conv2", DENSE_TACTIC)]}))
    judgement = judge([HALF], None, dense)
    assert judgement.verdict is Verdict.ELIGIBLE_NOT_CHOSEN
    assert judgement.dense == ("conv1",)


@pytest.mark.parametrize(
    ("log", "engine", "said"),
    [
        (None, None, "neither an engine nor a build log"),
        (LOG.format(1, "conv1", 0).splitlines()[0], None, "ends between its two lines"),
        (None, '{"Layers": ["conv1"]}', "profiling verbosity"),
        (None, json.dumps({"Layers": [layer("conv1", "__myelin_CASK_STUB")]}), "names that tell nothing"),
        (None, json.dumps({"Layers": [layer("something else", DENSE_TACTIC)]}), "names that tell nothing"),
    ],
)
def test_unknown_and_why(log: str | None, engine: str | None, said: str) -> None:
    judgement = judge([HALF], parse_log(log) if log else None, parse_layers(engine) if engine else None)
    assert judgement.verdict is Verdict.UNKNOWN
    assert said in judgement.reason


@given(
    st.lists(st.sampled_from([None, "1:4", "2:4", "3:4"]), max_size=3),
    st.none() | st.tuples(st.integers(0, 3), st.none() | st.integers(0, 3)),
    st.none() | st.lists(st.sampled_from([SPARSE_TACTIC, DENSE_TACTIC, "__myl_x", ""]), max_size=3),
)
def test_sparse_is_never_claimed_without_a_witness(
    holds: list[str | None], counts: tuple[int, int | None] | None, tactics: list[str] | None
) -> None:
    weights = [Weight(f"w{index}", f"n{index}", holds=held) for index, held in enumerate(holds)]
    text = ""
    if counts is not None:
        text = f"(Sparsity) Found {counts[0]} layer(s) eligible to use sparse tactics\n"
        if counts[1] is not None:
            text += f"(Sparsity) Chose {counts[1]} layer(s) using sparse tactics\n"
    engine = None
    if tactics is not None:
        engine = parse_layers(
            json.dumps({"Layers": [layer(f"n{index}", name) for index, name in enumerate(tactics)]})
        )
    judgement = judge(weights, parse_log(text), engine)
    witnessed = bool(counts and counts[1]) or SPARSE_TACTIC in (tactics or [])
    assert (judgement.verdict is Verdict.SPARSE_USED) == witnessed
    assert judgement.reason
    assert "\n" not in judgement.reason
    assert json.loads(json.dumps(judgement.to_dict()))["verdict"] == judgement.verdict.value
