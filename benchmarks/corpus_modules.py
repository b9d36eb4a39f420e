"""Modules of the corpus that need code: wrappers around zoo models and small networks written by hand.

Needs torch; torchvision and transformers are imported where they are used.  Every function returns an `nn.Module`
that takes the inputs its `corpus_networks.Network` lists, in order, and returns a tensor or a tuple of tensors.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Applied(nn.Module):  # type: ignore[misc, unused-ignore]
    """Modules together with the function that applies them: ``function(modules, *inputs)``."""

    def __init__(self, function: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.parts, *inputs)


# -------------------------------------------------------------------------------------------------- transformers
def hugging_face(
    model_class: str,
    config_class: str,
    config: dict[str, Any],
    names: tuple[str, ...],
    fields: tuple[str, ...],
) -> Any:
    """A transformers model of a configuration, with positional inputs `names` and the output `fields` as a tuple.

    `model_class` may name a part of a model: ``WhisperModel.encoder``.  Last hidden states get a linear head of ten
    outputs each: as an output of the file the residual stream could not be cut at all.  A model class of the form
    ``BertModel!`` goes without.
    """
    transformers = importlib.import_module("transformers")
    headed = not model_class.endswith("!")
    class_name, _, part = model_class.rstrip("!").partition(".")
    configuration = getattr(transformers, config_class)(**config)
    if hasattr(configuration, "use_cache"):
        configuration.use_cache = False
    configuration._attn_implementation = "eager"
    if "experts_implementation" in config:
        configuration._experts_implementation = config["experts_implementation"]
    model = getattr(transformers, class_name)(configuration)
    if part:
        model = getattr(model, part)

    causal = class_name.endswith(("CausalLM", "LMHeadModel"))

    def apply(parts: Any, *inputs: Any) -> Any:
        arguments = dict(zip(names, inputs, strict=True))
        if causal:
            # Without a mask the model looks for packed sequences, which the TorchScript exporter cannot express.
            arguments["attention_mask"] = torch.ones_like(inputs[0])
        out = parts["model"](**arguments, return_dict=True)
        found = [getattr(out, name) for name in fields]
        return tuple(
            parts["head"](v) if name == "last_hidden_state" and headed else v
            for name, v in zip(fields, found, strict=True)
        )

    if headed and "last_hidden_state" in fields:
        return Applied(apply, model=model, head=nn.Linear(configuration.hidden_size, 10))
    return Applied(apply, model=model)


# --------------------------------------------------------------------------------------------------- torchvision
def vision_vgg11() -> Any:
    """VGG-11 with 512 instead of 4096 hidden units: the paper's classifier alone is 490 MB."""
    return _narrow_classifier("vgg11", 25088)


def vision_vgg11_bn() -> Any:
    """VGG-11 with BatchNorm, classifier as in `vision_vgg11`."""
    return _narrow_classifier("vgg11_bn", 25088)


def vision_alexnet() -> Any:
    """AlexNet with 512 instead of 4096 hidden units."""
    return _narrow_classifier("alexnet", 9216)


def _narrow_classifier(name: str, features: int) -> Any:
    models = importlib.import_module("torchvision.models")
    with torch.device("meta"):
        model = (
            models.get_model(name, weights=None, init_weights=False)
            if name != "alexnet"
            else models.alexnet()
        )
    model.classifier = nn.Sequential(
        nn.Linear(features, 512),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(512, 1000),
    )
    model.features = model.features.to_empty(device="cpu")
    for layer in model.features.modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            layer.reset_parameters()
    return model


def vision_wide_resnet14_2() -> Any:
    """A Wide ResNet with one bottleneck a stage (the registered one is 275 MB)."""
    resnet = importlib.import_module("torchvision.models.resnet")
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], width_per_group=128)


def vision_vit_s_16() -> Any:
    """torchvision's VisionTransformer (nn.MultiheadAttention) in a small size."""
    vision = importlib.import_module("torchvision.models.vision_transformer")
    return vision.VisionTransformer(224, 16, num_layers=4, num_heads=6, hidden_dim=384, mlp_dim=1536)


def _resnet18_features() -> Any:
    models = importlib.import_module("torchvision.models")
    getter = importlib.import_module("torchvision.models._utils").IntermediateLayerGetter
    return getter(models.resnet18(weights=None), return_layers={"layer4": "out"})


def vision_fcn_resnet18() -> Any:
    """FCN on ResNet-18 (the registered one, on ResNet-50, is 141 MB)."""
    fcn = importlib.import_module("torchvision.models.segmentation.fcn")
    return Applied(lambda p, x: p["net"](x)["out"], net=fcn.FCN(_resnet18_features(), fcn.FCNHead(512, 21)))


def vision_deeplabv3_resnet18() -> Any:
    """DeepLabV3 on ResNet-18."""
    deeplab = importlib.import_module("torchvision.models.segmentation.deeplabv3")
    return Applied(
        lambda p, x: p["net"](x)["out"],
        net=deeplab.DeepLabV3(_resnet18_features(), deeplab.DeepLabHead(512, 21)),
    )


def _segmentation(name: str) -> Any:
    segmentation = importlib.import_module("torchvision.models.segmentation")
    model = getattr(segmentation, name)(weights=None, weights_backbone=None)
    return Applied(lambda p, x: p["net"](x)["out"], net=model)


def vision_deeplabv3_mobilenet_v3_large() -> Any:
    """DeepLabV3 on MobileNetV3."""
    return _segmentation("deeplabv3_mobilenet_v3_large")


def vision_lraspp_mobilenet_v3_large() -> Any:
    """Lite R-ASPP on MobileNetV3."""
    return _segmentation("lraspp_mobilenet_v3_large")


def _pyramid(kind: str) -> Any:
    backbones = importlib.import_module("torchvision.models.detection.backbone_utils")
    if kind == "resnet18":
        blocks = importlib.import_module("torchvision.ops.feature_pyramid_network")
        return backbones.resnet_fpn_backbone(
            backbone_name="resnet18",
            weights=None,
            trainable_layers=5,
            returned_layers=[2, 3, 4],
            extra_blocks=blocks.LastLevelP6P7(256, 256),
        )
    return backbones.mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=6
    )


def _dense_detector(backbone: Any, head: Any) -> Any:
    def apply(parts: Any, x: Any) -> Any:
        return tuple(parts["head"](list(parts["backbone"](x).values())).values())

    return Applied(apply, backbone=backbone, head=head)


def vision_retinanet_resnet18_fpn() -> Any:
    """RetinaNet on ResNet-18 with a feature pyramid up to the tensors that enter NonMaxSuppression."""
    retina = importlib.import_module("torchvision.models.detection.retinanet")
    return _dense_detector(_pyramid("resnet18"), retina.RetinaNetHead(256, 9, 21))


def vision_fcos_resnet18_fpn() -> Any:
    """FCOS on ResNet-18 (GroupNorm heads shared by the levels) up to NonMaxSuppression."""
    fcos = importlib.import_module("torchvision.models.detection.fcos")
    return _dense_detector(_pyramid("resnet18"), fcos.FCOSHead(256, 1, 21))


def vision_ssdlite320_mobilenet_v3_large() -> Any:
    """SSDlite on MobileNetV3 up to NonMaxSuppression."""
    detection = importlib.import_module("torchvision.models.detection")
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)
    return _dense_detector(model.backbone, model.head)


def vision_rpn_mobilenet_v3_fpn() -> Any:
    """The region-proposal head of Faster R-CNN on MobileNetV3 with a feature pyramid."""
    rpn = importlib.import_module("torchvision.models.detection.rpn")

    def apply(parts: Any, x: Any) -> Any:
        logits, boxes = parts["head"](list(parts["backbone"](x).values()))
        return tuple(logits) + tuple(boxes)

    return Applied(apply, backbone=_pyramid("mobilenet"), head=rpn.RPNHead(256, 3))


def vision_mc3_18() -> Any:
    """Mixed-convolution 3-D ResNet on clips."""
    return importlib.import_module("torchvision.models.video").mc3_18(weights=None)


def vision_s3d() -> Any:
    """Separable 3-D Inception on clips."""
    return importlib.import_module("torchvision.models.video").s3d(weights=None)


def vision_raft_small() -> Any:
    """RAFT optical flow with two iterations (GridSample, a convolutional GRU)."""
    flow = importlib.import_module("torchvision.models.optical_flow")
    return Applied(lambda p, a, b: p["net"](a, b, num_flow_updates=2)[-1], net=flow.raft_small(weights=None))


# ------------------------------------------------------------------------------------------------------- by hand
def _block(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> Any:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
        nn.SiLU(),
    )


def hand_gru() -> Any:
    """Two stacked GRU layers and a linear head on every step."""
    return Applied(
        lambda p, x: p["head"](p["gru"](x)[0]),
        gru=nn.GRU(64, 96, num_layers=2, batch_first=True),
        head=nn.Linear(96, 10),
    )


def hand_lstm_bidirectional() -> Any:
    """Two stacked bidirectional LSTM layers, LayerNorm, mean over time, a linear head."""

    def apply(p: Any, x: Any) -> Any:
        return p["head"](p["norm"](p["lstm"](x)[0]).mean(1))

    return Applied(
        apply,
        lstm=nn.LSTM(64, 80, num_layers=2, batch_first=True, bidirectional=True),
        norm=nn.LayerNorm(160),
        head=nn.Linear(160, 10),
    )


def hand_crnn() -> Any:
    """Convolutions, height folded into the channels, a bidirectional LSTM: a text line reader (CRNN)."""

    def apply(p: Any, x: Any) -> Any:
        x = p["cnn"](x)
        n, c, h, w = x.shape
        return p["head"](p["lstm"](x.permute(0, 3, 1, 2).reshape(n, w, c * h))[0])

    cnn = nn.Sequential(
        _block(1, 32),
        nn.MaxPool2d(2),
        _block(32, 64),
        nn.MaxPool2d(2),
        _block(64, 96),
        nn.MaxPool2d((2, 1)),
        _block(96, 96),
    )
    return Applied(
        apply,
        cnn=cnn,
        lstm=nn.LSTM(96 * 4, 96, batch_first=True, bidirectional=True),
        head=nn.Linear(192, 40),
    )


def hand_unet() -> Any:
    """U-Net with ConvTranspose and skip concatenation, three levels."""
    widths = (32, 64, 96, 128)
    downs, ups, merges = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
    previous = 3
    for width in widths:
        downs.append(nn.Sequential(_block(previous, width), _block(width, width)))
        previous = width
    for width in reversed(widths[:-1]):
        ups.append(nn.ConvTranspose2d(previous, width, 2, 2))
        merges.append(_block(2 * width, width))
        previous = width

    def apply(p: Any, x: Any) -> Any:
        skips = []
        for i, down in enumerate(p["downs"]):
            x = down(x if i == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(p["ups"], p["merges"], strict=True):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        return p["head"](x)

    return Applied(apply, downs=downs, ups=ups, merges=merges, head=nn.Conv2d(32, 5, 1))


def hand_super_resolution() -> Any:
    """Residual blocks and PixelShuffle, the input added back by bilinear resizing (EDSR, ESPCN)."""

    def apply(p: Any, x: Any) -> Any:
        y = start = p["first"](x)
        for block in p["blocks"]:
            y = y + block(y)
        y = p["up"](y + start)
        return p["last"](y) + nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")

    def residual() -> Any:
        return nn.Sequential(nn.Conv2d(48, 48, 3, padding=1), nn.PReLU(48), nn.Conv2d(48, 48, 3, padding=1))

    blocks = nn.ModuleList(residual() for _ in range(3))
    up = nn.Sequential(nn.Conv2d(48, 192, 3, padding=1), nn.PixelShuffle(2))
    return Applied(
        apply, first=nn.Conv2d(3, 48, 3, padding=1), blocks=blocks, up=up, last=nn.Conv2d(48, 3, 3, padding=1)
    )


def hand_temporal_convolution() -> Any:
    """Dilated gated 1-D convolutions with residual and skip paths (WaveNet)."""

    def apply(p: Any, x: Any) -> Any:
        x = p["first"](x)
        total = 0
        for gate, out, skip in zip(p["gates"], p["outs"], p["skips"], strict=True):
            a, b = gate(x).chunk(2, 1)
            h = torch.tanh(a) * torch.sigmoid(b)
            x = x + out(h)
            total = total + skip(h)
        return p["head"](torch.relu(total))

    gates = nn.ModuleList(nn.Conv1d(64, 128, 3, padding=2**i, dilation=2**i) for i in range(4))
    outs = nn.ModuleList(nn.Conv1d(64, 64, 1) for _ in range(4))
    skips = nn.ModuleList(nn.Conv1d(64, 96, 1) for _ in range(4))
    head = nn.Sequential(nn.Conv1d(96, 64, 1), nn.ReLU(), nn.Conv1d(64, 8, 1))
    return Applied(apply, first=nn.Conv1d(16, 64, 1), gates=gates, outs=outs, skips=skips, head=head)


class _C2f(nn.Module):  # type: ignore[misc, unused-ignore]
    """The split-and-collect block of YOLOv8."""

    def __init__(self, c_in: int, c_out: int, repeats: int) -> None:
        super().__init__()
        half = c_out // 2
        self.first = _block(c_in, c_out, 1)
        self.inner = nn.ModuleList(
            nn.Sequential(_block(half, half), _block(half, half)) for _ in range(repeats)
        )
        self.last = _block((2 + repeats) * half, c_out, 1)

    def forward(self, x: Any) -> Any:
        parts = list(self.first(x).chunk(2, 1))
        for inner in self.inner:
            parts.append(parts[-1] + inner(parts[-1]))
        return self.last(torch.cat(parts, 1))


def hand_yolo() -> Any:
    """C2f blocks, spatial pyramid pooling, and a distribution-focal box head read by a softmax (the YOLOv8 pattern)."""
    bins = 16

    def apply(p: Any, x: Any) -> Any:
        small = p["stage1"](p["stem"](x))
        large = p["stage2"](small)
        pooled = [p["squeeze"](large)]
        for _ in range(3):
            pooled.append(nn.functional.max_pool2d(pooled[-1], 5, 1, 2))
        large = p["pool"](torch.cat(pooled, 1))
        small = p["merge"](torch.cat([nn.functional.interpolate(large, scale_factor=2.0), small], 1))
        boxes, scores = [], []
        for i, feature in enumerate((small, large)):
            box = p["boxes"][i](feature)
            n, _, h, w = box.shape
            box = box.view(n, 4, bins, h * w).transpose(1, 2).softmax(1)
            boxes.append(p["expect"](box).view(n, 4, h * w))
            scores.append(p["scores"][i](feature).flatten(2))
        return torch.cat([torch.cat(boxes, 2), torch.cat(scores, 2).sigmoid()], 1)

    def head(width: int, out: int) -> Any:
        return nn.Sequential(_block(width, 64), _block(64, 64), nn.Conv2d(64, out, 1))

    return Applied(
        apply,
        stem=nn.Sequential(_block(3, 32, stride=2), _block(32, 64, stride=2)),
        stage1=_C2f(64, 64, 2),
        stage2=nn.Sequential(_block(64, 128, stride=2), _C2f(128, 128, 2)),
        squeeze=_block(128, 64, 1),
        pool=_block(256, 128, 1),
        merge=_C2f(192, 64, 1),
        boxes=nn.ModuleList([head(64, 4 * bins), head(128, 4 * bins)]),
        scores=nn.ModuleList([head(64, 20), head(128, 20)]),
        expect=nn.Conv2d(bins, 1, 1, bias=False),
    )


def hand_nafnet() -> Any:
    """NAFNet blocks: channel LayerNorm, SimpleGate (a product of two halves), simplified channel attention."""

    def block(width: int) -> Any:
        return nn.ModuleDict(
            {
                "norm": nn.GroupNorm(1, width),
                "expand": nn.Conv2d(width, 2 * width, 1),
                "spatial": nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
                "attend": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1)),
                "project": nn.Conv2d(width, width, 1),
                "widen": nn.Conv2d(width, 2 * width, 1),
                "narrow": nn.Conv2d(width, width, 1),
            }
        )

    def gate(x: Any) -> Any:
        a, b = x.chunk(2, 1)
        return a * b

    def apply(p: Any, x: Any) -> Any:
        y = p["first"](x)
        for b in p["blocks"]:
            h = gate(b["spatial"](b["expand"](b["norm"](y))))
            y = y + b["project"](h * b["attend"](h))
            y = y + b["narrow"](gate(b["widen"](y)))
        return x + p["last"](y)

    blocks = nn.ModuleList(block(48) for _ in range(3))
    return Applied(
        apply, first=nn.Conv2d(3, 48, 3, padding=1), blocks=blocks, last=nn.Conv2d(48, 3, 3, padding=1)
    )


def hand_torch_encoder() -> Any:
    """PyTorch's own TransformerEncoder, post-norm, with a classifier on the mean."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return Applied(lambda p, x: p["head"](p["encoder"](x).mean(1)), encoder=encoder, head=nn.Linear(64, 10))


def hand_generator() -> Any:
    """A DCGAN generator: a linear layer seen as an image, then transposed convolutions."""
    up = nn.Sequential()
    for c_in, c_out in ((128, 96), (96, 64), (64, 32)):
        up.extend([nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()])
    up.append(nn.Conv2d(32, 3, 3, padding=1))
    return Applied(
        lambda p, x: p["up"](p["first"](x).view(-1, 128, 4, 4)).tanh(), first=nn.Linear(64, 128 * 16), up=up
    )


def hand_point_net() -> Any:
    """PointNet: shared 1-D convolutions, a maximum over the points, a learnt 3x3 transform of the input."""

    def layers(*widths: int) -> Any:
        made: list[Any] = []
        for c_in, c_out in itertools.pairwise(widths):
            made += [nn.Conv1d(c_in, c_out, 1), nn.BatchNorm1d(c_out), nn.ReLU()]
        return nn.Sequential(*made)

    def apply(p: Any, x: Any) -> Any:
        turn = p["turn"](p["look"](x).amax(2)).view(-1, 3, 3)
        local = p["local"](torch.bmm(turn, x))
        whole = p["whole"](local).amax(2, keepdim=True)
        return p["head"](torch.cat([local, whole.expand(-1, -1, x.shape[2])], 1))

    return Applied(
        apply,
        look=layers(3, 32, 64),
        turn=nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 9)),
        local=layers(3, 32, 64),
        whole=layers(64, 96, 128),
        head=nn.Sequential(layers(192, 64), nn.Conv1d(64, 6, 1)),
    )
