"""F3. Plain convolutional networks, for images and for signals in time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt
from torch import nn

from fedsim.errors import ScenarioError
from fedsim.models.dropout import Dropout
from fedsim.models.model import Model
from fedsim.registry import register

_IMAGE = frozenset({"image"})
Width = Annotated[int, Gt(0)]
Rate = Annotated[float, Ge(0), Lt(1)]


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _odd(kernel: int) -> int:
    """The padding that keeps the size under an odd kernel."""
    if kernel % 2 == 0:
        message = f"a kernel of {kernel} has no middle, so it would shift the input; take an odd one, such as {kernel + 1}"
        raise ScenarioError("model.kernel", message)
    return kernel // 2


@register("cnn")
@dataclass(frozen=True)
class Cnn(Model):
    """Two convolutions with max pooling, then two linear layers.

    The architecture of McMahan et al., AISTATS 2017 (1,663,370 parameters on 1 x 28 x 28, 10 classes) is `{kernel: 5, hidden: 512}`;
    the default is smaller.
    """

    inputs: ClassVar[frozenset[str]] = _IMAGE
    channels: tuple[Width, Width] = (32, 64)
    kernel: Width = 3
    hidden: Width = 128

    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        self.require(shape, vocabulary, smallest=4)
        ch, height, width = shape
        first, second = self.channels
        same = _odd(self.kernel)
        return _named(
            conv1=nn.Conv2d(ch, first, self.kernel, padding=same),  # [B, 32, H, W]
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, self.kernel, padding=same),  # [B, 64, H/2, W/2]
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),  # [B, 64 H/4 W/4]
            fc1=nn.Linear(second * (height // 4) * (width // 4), self.hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(self.hidden, outputs),
        )


@register("lenet5")
@dataclass(frozen=True)
class LeNet5(Model):
    """LeNet-5: two 5 x 5 convolutions and three linear layers. LeCun, Bottou, Bengio, Haffner, Proc. IEEE 1998.

    Images with a side below 32 are padded by 2, as the paper pads 28 to 32.

    Differs: ReLU for tanh, max pooling for trainable subsampling, a full second convolution, a linear output for Gaussian connections.
    """

    inputs: ClassVar[frozenset[str]] = _IMAGE

    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        self.require(shape, vocabulary, smallest=12)
        ch, height, width = shape
        padding = 2 if min(height, width) < 32 else 0
        rows, columns = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width))
        return _named(
            conv1=nn.Conv2d(ch, 6, 5, padding=padding),  # [B, 6, 28, 28]
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),  # [B, 16, 10, 10]
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),  # [B, 400]
            fc1=nn.Linear(16 * rows * columns, 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, outputs),
        )


@register("pfl-cnn")
@dataclass(frozen=True)
class PflCnn(Model):
    """Two 3 x 3 convolutions, dropout, two linear layers: the CIFAR-10 benchmark network of pfl-research.

    Granqvist et al., NeurIPS 2024 (datasets and benchmarks), after the EMNIST network of Reddi et al., ICLR 2021. 1,626,442 parameters on
    3 x 32 x 32 with 10 classes.
    """

    inputs: ClassVar[frozenset[str]] = _IMAGE
    dropout1: Rate = 0.25
    dropout2: Rate = 0.5

    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        self.require(shape, vocabulary, smallest=6)
        ch, height, width = shape
        return _named(
            conv1=nn.Conv2d(ch, 32, 3),  # [B, 32, 30, 30]
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 3),  # [B, 64, 28, 28]
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            drop1=Dropout(self.dropout1),
            flatten=nn.Flatten(),  # [B, 12544]
            fc1=nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128),
            relu3=nn.ReLU(),
            drop2=Dropout(self.dropout2),
            fc2=nn.Linear(128, outputs),
        )


@register("cnn1d")
@dataclass(frozen=True)
class Cnn1d(Model):
    """Two convolutions in time with max pooling, then two linear layers: for sensor signals such as HAR, 9 channels x 128 samples."""

    inputs: ClassVar[frozenset[str]] = frozenset({"signal"})
    channels: tuple[Width, Width] = (32, 64)
    kernel: Width = 5
    hidden: Width = 128

    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        self.require(shape, vocabulary, smallest=4)
        ch, samples = shape
        first, second = self.channels
        same = _odd(self.kernel)
        return _named(
            conv1=nn.Conv1d(ch, first, self.kernel, padding=same),  # [B, 32, T]
            relu1=nn.ReLU(),
            pool1=nn.MaxPool1d(2),
            conv2=nn.Conv1d(first, second, self.kernel, padding=same),  # [B, 64, T/2]
            relu2=nn.ReLU(),
            pool2=nn.MaxPool1d(2),
            flatten=nn.Flatten(),  # [B, 64 T/4]
            fc1=nn.Linear(second * (samples // 4), self.hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(self.hidden, outputs),
        )


@register("vgg16-gn")
@dataclass(frozen=True)
class Vgg16(Model):
    """VGG-16 for images of 32 x 32, with GroupNorm, as FedPara trains it. Simonyan and Zisserman, ICLR 2015, configuration D.

    Thirteen 3 x 3 convolutions, five times halved, then three linear layers. 15,253,578 parameters on 3 x 32 x 32 with 10 classes.

    Differs: GroupNorm (two groups) after each convolution; linear layers 512 wide where ImageNet's are 4096.
    """

    inputs: ClassVar[frozenset[str]] = _IMAGE
    groups: Width = 2
    dropout: Rate = 0.5

    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        self.require(shape, vocabulary, smallest=32)
        before, height, width = shape
        layers: list[nn.Module] = []
        for after, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(self.groups, after), nn.ReLU()]
                before = after
            layers.append(nn.MaxPool2d(2))
        return _named(
            features=nn.Sequential(*layers),  # [B, 512, H/32, W/32]
            flatten=nn.Flatten(),
            drop1=Dropout(self.dropout),
            fc1=nn.Linear(512 * (height // 32) * (width // 32), 512),
            relu1=nn.ReLU(),
            drop2=Dropout(self.dropout),
            fc2=nn.Linear(512, 512),
            relu2=nn.ReLU(),
            fc3=nn.Linear(512, outputs),
        )
