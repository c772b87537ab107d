"""Every classification backbone and video model of torchvision, told without importing it.

One line a model, for its default weights: what `torchvision.models.get_model_weights(name).DEFAULT`
says of the file and the transforms, and where the network is cut. A test compares each line with
the installed torchvision.
"""

from dataclasses import dataclass
from typing import Literal

from featurex_ray.models.spec import IMAGENET_MEAN, IMAGENET_STD

_HALF = (0.5, 0.5, 0.5)
_KINETICS_MEAN = (0.43216, 0.394666, 0.37645)
_KINETICS_STD = (0.22803, 0.22145, 0.216989)
_MVIT_MEAN = (0.45, 0.45, 0.45)
_MVIT_STD = (0.225, 0.225, 0.225)


@dataclass(frozen=True)
class ZooModel:
    """A model of torchvision, cut before its last layer.

    Attributes:
        dimension: Of the vector that enters the last layer.
        head: The last layer, the one that gives the classes; the feature lies before it.
        weights_file: Under `hub/checkpoints` of TORCH_HOME; its name ends in the start of its sha256.
        size: Height and width of the input.
        resize: The shorter side before the centre crop.
    """

    dimension: int
    head: str
    weights_file: str
    size: int
    resize: int


@dataclass(frozen=True)
class ImageModel(ZooModel):
    """A classification backbone.

    Attributes:
        map_layer: The layer that gives the last feature map.
        map_shape: (C, h, w) of that map.
        interpolation: Of the resize.
        mean: Of the normalisation.
        std: Of the normalisation.
    """

    map_layer: str
    map_shape: tuple[int, int, int]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class VideoModel(ZooModel):
    """A video model, trained on Kinetics-400.

    torchvision squashes frames to 128x171 (3D ResNets) or 256x256 (S3D) before the crop; here the
    aspect ratio is kept, as for every other model, and the shorter side is the same.

    Attributes:
        default_sampling: As many frames as the clips that the weights were judged on.
        min_frames: The shortest clip that the network takes.
        max_frames: The longest, None for any.
        mean: Of the normalisation.
        std: Of the normalisation.
    """

    default_sampling: str
    min_frames: int = 1
    max_frames: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


# One model a line reads better than one argument a line.
# ruff: noqa: E501
# fmt: off
IMAGE_MODELS: dict[str, ImageModel] = {
    "alexnet": ImageModel(4096, "classifier.6", "alexnet-owt-7be5be79.pth", 224, 256, "features", (256, 6, 6)),
    "convnext_base": ImageModel(1024, "classifier.2", "convnext_base-6075fbad.pth", 224, 232, "features", (1024, 7, 7)),
    "convnext_large": ImageModel(1536, "classifier.2", "convnext_large-ea097f82.pth", 224, 232, "features", (1536, 7, 7)),
    "convnext_small": ImageModel(768, "classifier.2", "convnext_small-0c510722.pth", 224, 230, "features", (768, 7, 7)),
    "convnext_tiny": ImageModel(768, "classifier.2", "convnext_tiny-983f1562.pth", 224, 236, "features", (768, 7, 7)),
    "densenet121": ImageModel(1024, "classifier", "densenet121-a639ec97.pth", 224, 256, "features", (1024, 7, 7)),
    "densenet161": ImageModel(2208, "classifier", "densenet161-8d451a50.pth", 224, 256, "features", (2208, 7, 7)),
    "densenet169": ImageModel(1664, "classifier", "densenet169-b2777c0a.pth", 224, 256, "features", (1664, 7, 7)),
    "densenet201": ImageModel(1920, "classifier", "densenet201-c1103571.pth", 224, 256, "features", (1920, 7, 7)),
    "efficientnet_b0": ImageModel(1280, "classifier.1", "efficientnet_b0_rwightman-7f5810bc.pth", 224, 256, "features", (1280, 7, 7), interpolation="bicubic"),
    "efficientnet_b1": ImageModel(1280, "classifier.1", "efficientnet_b1-c27df63c.pth", 240, 255, "features", (1280, 8, 8)),
    "efficientnet_b2": ImageModel(1408, "classifier.1", "efficientnet_b2_rwightman-c35c1473.pth", 288, 288, "features", (1408, 9, 9), interpolation="bicubic"),
    "efficientnet_b3": ImageModel(1536, "classifier.1", "efficientnet_b3_rwightman-b3899882.pth", 300, 320, "features", (1536, 10, 10), interpolation="bicubic"),
    "efficientnet_b4": ImageModel(1792, "classifier.1", "efficientnet_b4_rwightman-23ab8bcd.pth", 380, 384, "features", (1792, 12, 12), interpolation="bicubic"),
    "efficientnet_b5": ImageModel(2048, "classifier.1", "efficientnet_b5_lukemelas-1a07897c.pth", 456, 456, "features", (2048, 15, 15), interpolation="bicubic"),
    "efficientnet_b6": ImageModel(2304, "classifier.1", "efficientnet_b6_lukemelas-24a108a5.pth", 528, 528, "features", (2304, 17, 17), interpolation="bicubic"),
    "efficientnet_b7": ImageModel(2560, "classifier.1", "efficientnet_b7_lukemelas-c5b4e57e.pth", 600, 600, "features", (2560, 19, 19), interpolation="bicubic"),
    "efficientnet_v2_l": ImageModel(1280, "classifier.1", "efficientnet_v2_l-59c71312.pth", 480, 480, "features", (1280, 15, 15), interpolation="bicubic", mean=_HALF, std=_HALF),
    "efficientnet_v2_m": ImageModel(1280, "classifier.1", "efficientnet_v2_m-dc08266a.pth", 480, 480, "features", (1280, 15, 15)),
    "efficientnet_v2_s": ImageModel(1280, "classifier.1", "efficientnet_v2_s-dd5fe13b.pth", 384, 384, "features", (1280, 12, 12)),
    "googlenet": ImageModel(1024, "fc", "googlenet-1378be20.pth", 224, 256, "inception5b", (1024, 7, 7)),
    "inception_v3": ImageModel(2048, "fc", "inception_v3_google-0cc3c7bd.pth", 299, 342, "Mixed_7c", (2048, 8, 8)),
    "maxvit_t": ImageModel(512, "classifier.5", "maxvit_t-bc5ab103.pth", 224, 224, "blocks.3", (512, 7, 7), interpolation="bicubic"),
    "mnasnet0_5": ImageModel(1280, "classifier.1", "mnasnet0.5_top1_67.823-3ffadce67e.pth", 224, 256, "layers", (1280, 7, 7)),
    "mnasnet0_75": ImageModel(1280, "classifier.1", "mnasnet0_75-7090bc5f.pth", 224, 232, "layers", (1280, 7, 7)),
    "mnasnet1_0": ImageModel(1280, "classifier.1", "mnasnet1.0_top1_73.512-f206786ef8.pth", 224, 256, "layers", (1280, 7, 7)),
    "mnasnet1_3": ImageModel(1280, "classifier.1", "mnasnet1_3-a4c69d6f.pth", 224, 232, "layers", (1280, 7, 7)),
    "mobilenet_v2": ImageModel(1280, "classifier.1", "mobilenet_v2-7ebf99e0.pth", 224, 232, "features", (1280, 7, 7)),
    "mobilenet_v3_large": ImageModel(1280, "classifier.3", "mobilenet_v3_large-5c1a4163.pth", 224, 232, "features", (960, 7, 7)),
    "mobilenet_v3_small": ImageModel(1024, "classifier.3", "mobilenet_v3_small-047dcff4.pth", 224, 256, "features", (576, 7, 7)),
    "regnet_x_16gf": ImageModel(2048, "fc", "regnet_x_16gf-ba3796d7.pth", 224, 232, "trunk_output", (2048, 7, 7)),
    "regnet_x_1_6gf": ImageModel(912, "fc", "regnet_x_1_6gf-a12f2b72.pth", 224, 232, "trunk_output", (912, 7, 7)),
    "regnet_x_32gf": ImageModel(2520, "fc", "regnet_x_32gf-6eb8fdc6.pth", 224, 232, "trunk_output", (2520, 7, 7)),
    "regnet_x_3_2gf": ImageModel(1008, "fc", "regnet_x_3_2gf-7071aa85.pth", 224, 232, "trunk_output", (1008, 7, 7)),
    "regnet_x_400mf": ImageModel(400, "fc", "regnet_x_400mf-62229a5f.pth", 224, 232, "trunk_output", (400, 7, 7)),
    "regnet_x_800mf": ImageModel(672, "fc", "regnet_x_800mf-94a99ebd.pth", 224, 232, "trunk_output", (672, 7, 7)),
    "regnet_x_8gf": ImageModel(1920, "fc", "regnet_x_8gf-2b70d774.pth", 224, 232, "trunk_output", (1920, 7, 7)),
    "regnet_y_128gf": ImageModel(7392, "fc", "regnet_y_128gf_swag-c8ce3e52.pth", 384, 384, "trunk_output", (7392, 12, 12), interpolation="bicubic"),
    "regnet_y_16gf": ImageModel(3024, "fc", "regnet_y_16gf-3e4a00f9.pth", 224, 232, "trunk_output", (3024, 7, 7)),
    "regnet_y_1_6gf": ImageModel(888, "fc", "regnet_y_1_6gf-0d7bc02a.pth", 224, 232, "trunk_output", (888, 7, 7)),
    "regnet_y_32gf": ImageModel(3712, "fc", "regnet_y_32gf-8db6d4b5.pth", 224, 232, "trunk_output", (3712, 7, 7)),
    "regnet_y_3_2gf": ImageModel(1512, "fc", "regnet_y_3_2gf-9180c971.pth", 224, 232, "trunk_output", (1512, 7, 7)),
    "regnet_y_400mf": ImageModel(440, "fc", "regnet_y_400mf-e6988f5f.pth", 224, 232, "trunk_output", (440, 7, 7)),
    "regnet_y_800mf": ImageModel(784, "fc", "regnet_y_800mf-58fc7688.pth", 224, 232, "trunk_output", (784, 7, 7)),
    "regnet_y_8gf": ImageModel(2016, "fc", "regnet_y_8gf-dc2b1b54.pth", 224, 232, "trunk_output", (2016, 7, 7)),
    "resnet101": ImageModel(2048, "fc", "resnet101-cd907fc2.pth", 224, 232, "layer4", (2048, 7, 7)),
    "resnet152": ImageModel(2048, "fc", "resnet152-f82ba261.pth", 224, 232, "layer4", (2048, 7, 7)),
    "resnet18": ImageModel(512, "fc", "resnet18-f37072fd.pth", 224, 256, "layer4", (512, 7, 7)),
    "resnet34": ImageModel(512, "fc", "resnet34-b627a593.pth", 224, 256, "layer4", (512, 7, 7)),
    "resnet50": ImageModel(2048, "fc", "resnet50-11ad3fa6.pth", 224, 232, "layer4", (2048, 7, 7)),
    "resnext101_32x8d": ImageModel(2048, "fc", "resnext101_32x8d-110c445d.pth", 224, 232, "layer4", (2048, 7, 7)),
    "resnext101_64x4d": ImageModel(2048, "fc", "resnext101_64x4d-173b62eb.pth", 224, 232, "layer4", (2048, 7, 7)),
    "resnext50_32x4d": ImageModel(2048, "fc", "resnext50_32x4d-1a0047aa.pth", 224, 232, "layer4", (2048, 7, 7)),
    "shufflenet_v2_x0_5": ImageModel(1024, "fc", "shufflenetv2_x0.5-f707e7126e.pth", 224, 256, "conv5", (1024, 7, 7)),
    "shufflenet_v2_x1_0": ImageModel(1024, "fc", "shufflenetv2_x1-5666bf0f80.pth", 224, 256, "conv5", (1024, 7, 7)),
    "shufflenet_v2_x1_5": ImageModel(1024, "fc", "shufflenetv2_x1_5-3c479a10.pth", 224, 232, "conv5", (1024, 7, 7)),
    "shufflenet_v2_x2_0": ImageModel(2048, "fc", "shufflenetv2_x2_0-8be3c8ee.pth", 224, 232, "conv5", (2048, 7, 7)),
    "squeezenet1_0": ImageModel(512, "classifier.1", "squeezenet1_0-b66bff10.pth", 224, 256, "features", (512, 13, 13)),
    "squeezenet1_1": ImageModel(512, "classifier.1", "squeezenet1_1-b8a52dc0.pth", 224, 256, "features", (512, 13, 13)),
    "swin_b": ImageModel(1024, "head", "swin_b-68c6b09e.pth", 224, 238, "permute", (1024, 7, 7), interpolation="bicubic"),
    "swin_s": ImageModel(768, "head", "swin_s-5e29d889.pth", 224, 246, "permute", (768, 7, 7), interpolation="bicubic"),
    "swin_t": ImageModel(768, "head", "swin_t-704ceda3.pth", 224, 232, "permute", (768, 7, 7), interpolation="bicubic"),
    "swin_v2_b": ImageModel(1024, "head", "swin_v2_b-781e5279.pth", 256, 272, "permute", (1024, 8, 8), interpolation="bicubic"),
    "swin_v2_s": ImageModel(768, "head", "swin_v2_s-637d8ceb.pth", 256, 260, "permute", (768, 8, 8), interpolation="bicubic"),
    "swin_v2_t": ImageModel(768, "head", "swin_v2_t-b137f0e2.pth", 256, 260, "permute", (768, 8, 8), interpolation="bicubic"),
    "vgg11": ImageModel(4096, "classifier.6", "vgg11-8a719046.pth", 224, 256, "features", (512, 7, 7)),
    "vgg11_bn": ImageModel(4096, "classifier.6", "vgg11_bn-6002323d.pth", 224, 256, "features", (512, 7, 7)),
    "vgg13": ImageModel(4096, "classifier.6", "vgg13-19584684.pth", 224, 256, "features", (512, 7, 7)),
    "vgg13_bn": ImageModel(4096, "classifier.6", "vgg13_bn-abd245e5.pth", 224, 256, "features", (512, 7, 7)),
    "vgg16": ImageModel(4096, "classifier.6", "vgg16-397923af.pth", 224, 256, "features", (512, 7, 7)),
    "vgg16_bn": ImageModel(4096, "classifier.6", "vgg16_bn-6c64b313.pth", 224, 256, "features", (512, 7, 7)),
    "vgg19": ImageModel(4096, "classifier.6", "vgg19-dcbb9e9d.pth", 224, 256, "features", (512, 7, 7)),
    "vgg19_bn": ImageModel(4096, "classifier.6", "vgg19_bn-c79401a0.pth", 224, 256, "features", (512, 7, 7)),
    "vit_b_16": ImageModel(768, "heads.head", "vit_b_16-c867db91.pth", 224, 256, "encoder", (768, 14, 14)),
    "vit_b_32": ImageModel(768, "heads.head", "vit_b_32-d86f8d99.pth", 224, 256, "encoder", (768, 7, 7)),
    "vit_h_14": ImageModel(1280, "heads.head", "vit_h_14_swag-80465313.pth", 518, 518, "encoder", (1280, 37, 37), interpolation="bicubic"),
    "vit_l_16": ImageModel(1024, "heads.head", "vit_l_16-852ce7e3.pth", 224, 242, "encoder", (1024, 14, 14)),
    "vit_l_32": ImageModel(1024, "heads.head", "vit_l_32-c7638314.pth", 224, 256, "encoder", (1024, 7, 7)),
    "wide_resnet101_2": ImageModel(2048, "fc", "wide_resnet101_2-d733dc28.pth", 224, 232, "layer4", (2048, 7, 7)),
    "wide_resnet50_2": ImageModel(2048, "fc", "wide_resnet50_2-9ba9bcbe.pth", 224, 232, "layer4", (2048, 7, 7)),
}

VIDEO_MODELS: dict[str, VideoModel] = {
    "mc3_18": VideoModel(512, "fc", "mc3_18-a90a0ba3.pth", 112, 128, "uniform:16", mean=_KINETICS_MEAN, std=_KINETICS_STD),
    "mvit_v1_b": VideoModel(768, "head.1", "mvit_v1_b-dbeb1030.pth", 224, 256, "uniform:16", min_frames=16, max_frames=16, mean=_MVIT_MEAN, std=_MVIT_STD),
    "mvit_v2_s": VideoModel(768, "head.1", "mvit_v2_s-ae3be167.pth", 224, 256, "uniform:16", min_frames=16, max_frames=16, mean=_MVIT_MEAN, std=_MVIT_STD),
    "r2plus1d_18": VideoModel(512, "fc", "r2plus1d_18-91a641e6.pth", 112, 128, "uniform:16", mean=_KINETICS_MEAN, std=_KINETICS_STD),
    "r3d_18": VideoModel(512, "fc", "r3d_18-b3b3357e.pth", 112, 128, "uniform:16", mean=_KINETICS_MEAN, std=_KINETICS_STD),
    "s3d": VideoModel(1024, "classifier.1", "s3d-d76dad2f.pth", 224, 256, "uniform:128", min_frames=14, mean=_KINETICS_MEAN, std=_KINETICS_STD),
    "swin3d_b": VideoModel(1024, "head", "swin3d_b_1k-24f7c7c6.pth", 224, 256, "uniform:32"),
    "swin3d_s": VideoModel(768, "head", "swin3d_s-da41c237.pth", 224, 256, "uniform:32"),
    "swin3d_t": VideoModel(768, "head", "swin3d_t-7615ae03.pth", 224, 256, "uniform:32"),
}
# fmt: on
