"""The networks of the corpus: what is exported, with which inputs, and which of them with dynamic shapes.

This file is data with just enough code to build each network from its class; nothing is downloaded, every weight
is random.  torch, torchvision and timm are imported inside the builders, so the tables can be read without them.
The networks of transformers are in `corpus_transformers`.

Sources: the model zoos of torchvision and timm (their registries).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
#: One input: name, shape (batch first), and the exclusive upper bound of its integers (0: normal floats).
Input = tuple[str, Shape, int]
Outputs = tuple[str, ...]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True)
class Network:
    """One network of the corpus.

    Parameters
    ----------
    name : str
        Unique with `source`; the file is ``{source}-{name}-{dynamo|script}[-dyn].onnx``.
    source : str
        ``torchvision``, ``timm``, ``transformers`` or ``hand``.
    kind : str
        Which expectation holds: ``convolution`` (no normalisation over channels), ``normalised`` (convolutions
        with one), ``transformer``, ``mixed`` (convolutions and attention), ``mlp``, ``recurrent`` or ``features``.
    inputs : tuple of Input
        Name, shape and integer bound of each input.
    build : callable
        Makes the module, in eval mode or not, taking the inputs in order.
    dynamic : mapping
        Input name -> {axis: symbol}: the axes left open in the ``-dyn`` file; empty for none.
    sizes : tuple of mappings
        The symbol values at which the ``-dyn`` file is checked.
    exporters : tuple of str
        ``dynamo`` and ``script``.
    """

    name: str
    source: str
    kind: str
    inputs: tuple[Input, ...]
    build: Callable[[], Any]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    sizes: tuple[Mapping[str, int], ...] = ()
    exporters: tuple[str, ...] = ("dynamo", "script")


def image(side: int = 224) -> tuple[Input, ...]:
    """Two RGB images."""
    return (("x", (2, 3, side, side), 0),)


# ---------------------------------------------------------------------------------------------------------- timm
#: name [input side]; the smallest variant of each family that is built as its paper has it.
TIMM: Mapping[str, str] = {
    "convolution": """
        densenet121 ghostnet_100 res2net50_26w_4s:224 resnest14d mobilenetv3_small_100 skresnet18
        regnety_002 repvgg_a0 resnetv2_18 legacy_seresnet18 seresnet50 ecaresnet26t ese_vovnet19b_dw
        vovnet39a dpn68 rexnet_100 hrnet_w18_small dla34 dla46x_c cspresnet50 cspdarknet53
        cs3darknet_focus_s darknet53 efficientnet_lite0 tf_efficientnetv2_b0 efficientnetv2_rw_t
        tf_mobilenetv3_small_minimal_100 mixnet_s fbnetc_100 fbnetv3_b hardcorenas_a mnasnet_100
        spnasnet_100 lcnet_050 tinynet_e mobilenetv4_conv_small mobileone_s0 repvit_m0_9 repghostnet_050
        ghostnetv2_100 nf_regnet_b0 eca_nfnet_l0 gcresnext26ts seresnext26d_32x4d gernet_s resnext26ts
        eca_resnext26ts inception_next_atto starnet_s1 fasternet_t0 hgnetv2_b0 selecsls42 xception41
        convmixer_768_32 resnet18d resnetrs50:160 resnetaa50 resnetblur50 tresnet_m nf_ecaresnet26
        regnetx_002 regnetz_005 cspnext_tiny lcnetv2_small resnet26t
    """,
    "normalised": """
        efficientnet_b0_gn convnext_atto convnextv2_atto rdnet_tiny mambaout_femto resnetv2_50d_gn
    """,
    "transformer": """
        deit_tiny_patch16_224 swin_tiny_patch4_window7_224 beit_small:224 cait_xxs24_224
        xcit_nano_12_p16_224 pit_ti_224 tnt_s_patch16_224 convit_tiny crossvit_9_240:240 volo_d1_224
        twins_pcpvt_small twins_svt_small nest_tiny_jx swinv2_tiny_window8_256:256 swinv2_cr_tiny_224
        deit3_small_patch16_224 vit_tiny_patch16_224 vit_relpos_small_patch16_224 eva02_tiny_patch14_224
        hiera_tiny_224 davit_tiny pvt_v2_b0 mvitv2_tiny gcvit_xxtiny focalnet_tiny_srf
    """,
    "mixed": """
        mobilevit_xxs levit_128s coat_lite_tiny mobilevitv2_050 edgenext_xx_small poolformer_s12
        caformer_s18 convformer_s18 fastvit_t8 efficientformer_l1 efficientformerv2_s0 efficientvit_b0
        efficientvit_m0 botnet26t_256:256 halonet26t:256 lambda_resnet26t:256 sebotnet33ts_256:256
        visformer_tiny tiny_vit_5m_224 coatnet_pico_rw_224 maxvit_rmlp_pico_rw_256:256 sequencer2d_s
        nextvit_small levit_conv_128s mobilenetv4_hybrid_medium vit_small_r26_s32_224 repvit_m1
        swiftformer_xs shvit_s1 eca_botnext26ts_256:256 vitamin_small_224 iformer_t
    """,
    "mlp": """
        mixer_s32_224 resmlp_12_224 gmlp_ti16_224 gmixer_12_224
    """,
}
#: Constructor arguments that make a variant small enough where the registry has none.
TIMM_ARGUMENTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "beit_small": ("beit_base_patch16_224", {"embed_dim": 192, "depth": 4, "num_heads": 3}),
    "convmixer_768_32": ("convmixer_768_32", {"depth": 8}),
}
_IMAGE_SIZES = (
    {"batch": 1, "height": 192, "width": 224},
    {"batch": 3, "height": 256, "width": 192},
    {"batch": 2, "height": 320, "width": 288},
)
_BATCHES = ({"batch": 1}, {"batch": 3}, {"batch": 5})
_FULL = {"x": {0: "batch", 2: "height", 3: "width"}}
_BATCH = {"x": {0: "batch"}}
_BATCH_ONLY = _names(
    """
    deit_tiny_patch16_224 swin_tiny_patch4_window7_224 levit_128s mixer_s32_224 mobilevit_xxs
    xcit_nano_12_p16_224
    """
)
_IMAGE_DYNAMIC = _names(
    """
    densenet121 ghostnet_100 mobilenetv3_small_100 convnext_atto resnest14d skresnet18 res2net50_26w_4s
    hrnet_w18_small
    """
)


def _timm(name: str) -> Callable[[], Any]:
    def build() -> Any:
        registered, arguments = TIMM_ARGUMENTS.get(name, (name, {}))
        return importlib.import_module("timm").create_model(registered, pretrained=False, **arguments)

    return build


def timm_networks() -> list[Network]:
    """One network for each name of `TIMM`."""
    found = []
    for kind, names in TIMM.items():
        for entry in names.split():
            name, _, side = entry.partition(":")
            dynamic: Mapping[str, Mapping[int, str]] = (
                _BATCH if name in _BATCH_ONLY else _FULL if name in _IMAGE_DYNAMIC else {}
            )
            sizes = _BATCHES if name in _BATCH_ONLY else _IMAGE_SIZES if name in _IMAGE_DYNAMIC else ()
            found.append(Network(name, "timm", kind, image(int(side or 224)), _timm(name), dynamic, sizes))
    return found


# --------------------------------------------------------------------------------------------------- torchvision
TORCHVISION: Mapping[str, str] = {
    "convolution": """
        resnet18 resnet50 mobilenet_v2 shufflenet_v2_x1_0 efficientnet_b0 regnet_y_400mf squeezenet1_1
        densenet201 resnet34 resnext50_32x4d googlenet inception_v3:299 mobilenet_v3_small
        mobilenet_v3_large mnasnet0_5 mnasnet1_0 shufflenet_v2_x0_5 efficientnet_v2_s regnet_x_400mf
        regnet_x_800mf regnet_y_800mf squeezenet1_0 vgg11 vgg11_bn alexnet wide_resnet14_2 fcn_resnet18
        deeplabv3_resnet18 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large retinanet_resnet18_fpn
        ssdlite320_mobilenet_v3_large:320 rpn_mobilenet_v3_fpn mc3_18 s3d
    """,
    "normalised": "convnext_tiny fcos_resnet18_fpn",
    "transformer": "swin_t swin_v2_t:256 vit_s_16",
    "mixed": "maxvit_t raft_small:128",
}
_TV_IMAGE_DYNAMIC = _names(
    """
    resnet18 mobilenet_v2 shufflenet_v2_x1_0 efficientnet_b0 regnet_y_400mf squeezenet1_1 fcn_resnet18
    lraspp_mobilenet_v3_large
    """
)
_VISION_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def _torchvision(name: str) -> Callable[[], Any]:
    def build() -> Any:
        from benchmarks import corpus_modules as modules

        special = getattr(modules, f"vision_{name}", None)
        if special is not None:
            return special()
        models = importlib.import_module("torchvision.models")
        return models.get_model(name, weights=None, **_VISION_ARGUMENTS.get(name, {}))

    return build


def torchvision_networks() -> list[Network]:
    """One network for each name of `TORCHVISION`; the large ones in narrower forms, see `corpus_modules`."""
    found = []
    for kind, names in TORCHVISION.items():
        for entry in names.split():
            name, _, side = entry.partition(":")
            inputs = image(int(side or 224))
            if name in ("mc3_18", "s3d"):
                inputs = (("x", (2, 3, 14, 112, 112), 0),)
            elif name == "raft_small":
                inputs = (("first", (2, 3, 128, 128), 0), ("second", (2, 3, 128, 128), 0))
            dynamic, sizes = (_FULL, _IMAGE_SIZES) if name in _TV_IMAGE_DYNAMIC else ({}, ())
            found.append(Network(name, "torchvision", kind, inputs, _torchvision(name), dynamic, sizes))
    return found


# --------------------------------------------------------------------------------------------------- by hand
_SEQUENCE: tuple[Input, ...] = (("x", (2, 20, 64), 0),)
_SEQUENCE_DYNAMIC = {"x": {0: "batch", 1: "length"}}
_SEQUENCE_SIZES = ({"batch": 1, "length": 12}, {"batch": 3, "length": 20}, {"batch": 2, "length": 33})
#: name -> (kind, inputs, dynamic axes, sizes); the module is ``hand_{name}`` of `corpus_modules`.
HAND: Mapping[
    str, tuple[str, tuple[Input, ...], Mapping[str, Mapping[int, str]], tuple[Mapping[str, int], ...]]
] = {
    "gru": ("recurrent", _SEQUENCE, _SEQUENCE_DYNAMIC, _SEQUENCE_SIZES),
    "lstm_bidirectional": ("recurrent", _SEQUENCE, _SEQUENCE_DYNAMIC, _SEQUENCE_SIZES),
    "unet": ("convolution", image(128), _FULL, _IMAGE_SIZES),
    "crnn": ("mixed", (("x", (2, 1, 32, 96), 0),), {}, ()),
    "super_resolution": (
        "convolution",
        image(48),
        _FULL,
        (
            {"batch": 1, "height": 24, "width": 40},
            {"batch": 3, "height": 48, "width": 32},
            {"batch": 2, "height": 64, "width": 56},
        ),
    ),
    "temporal_convolution": (
        "convolution",
        (("x", (2, 16, 128), 0),),
        {"x": {0: "batch", 2: "time"}},
        ({"batch": 1, "time": 96}, {"batch": 3, "time": 128}, {"batch": 2, "time": 177}),
    ),
    "yolo": ("convolution", image(128), {}, ()),
    "nafnet": ("normalised", image(64), {}, ()),
    "torch_encoder": ("transformer", _SEQUENCE, {}, ()),
    "generator": ("convolution", (("x", (2, 64), 0),), {}, ()),
    "point_net": ("convolution", (("x", (2, 3, 256), 0),), {}, ()),
}


def _hand(name: str) -> Callable[[], Any]:
    def build() -> Any:
        from benchmarks import corpus_modules as modules

        return getattr(modules, f"hand_{name}")()

    return build


def hand_networks() -> list[Network]:
    """The small networks of `HAND`: recurrent cells and shapes of network the three zoos lack."""
    return [
        Network(name, "hand", kind, inputs, _hand(name), dynamic, sizes)
        for name, (kind, inputs, dynamic, sizes) in HAND.items()
    ]
