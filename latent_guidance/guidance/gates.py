"""The gates that rules with a gradient have in common, as knobs: a window of noise levels, every k-th step, clipping, a mask."""

from __future__ import annotations

from typing import Annotated, Any

from .knobs import UNLIMITED, Number, Socket, Whole

SigmaLo = Annotated[
    float,
    Number(
        min=0.0,
        max=UNLIMITED,
        step=0.01,
        neutral=0.0,
        label_zh="sigma 下限",
        help="The rule acts at noise levels sigma above this one; 0 is no lower limit.",
        help_zh="噪声水平 sigma 高于此值时本规则才起作用；0 表示没有下限。",
    ),
]
SigmaHi = Annotated[
    float,
    Number(
        min=0.0,
        max=UNLIMITED,
        step=0.01,
        neutral=UNLIMITED,
        label_zh="sigma 上限",
        help="The rule acts at noise levels sigma up to and including this one; 1000 is no upper limit.",
        help_zh="噪声水平 sigma 不高于此值时本规则才起作用；1000 表示没有上限。",
    ),
]
EveryK = Annotated[
    int,
    Whole(
        min=1,
        max=100,
        neutral=1,
        label_zh="每 k 步",
        help="Act at every k-th noise level of the run only; 1 is every one. Not for Heun, which visits each twice.",
        help_zh="只在每第 k 个噪声水平起作用；1 表示每一个。不适用于每个水平求值两次的 Heun。",
    ),
]
GradientClip = Annotated[
    float,
    Number(
        min=0.0,
        max=UNLIMITED,
        step=0.1,
        neutral=UNLIMITED,
        label_zh="梯度裁剪",
        help="Largest norm of the gradient for one picture, before guidance_scale, in unit-variance latents; 1000 clips nothing. "
        "With scaling relative (and FreeDoM's correction) the length is set afresh, so that clipping above 0 has no effect.",
        help_zh="单张图片梯度的最大范数（乘以引导强度之前，单位方差潜空间）；1000 表示不裁剪。"
        "强度换算为 relative（或 FreeDoM 的 correction）时长度会重新设定，大于 0 的裁剪不起作用。",
    ),
]
Mask = Annotated[
    Any,
    Socket(
        type="MASK",
        optional=True,
        label_zh="遮罩",
        help="Where to push, 0 to 1 over the picture; without one, everywhere.",
        help_zh="在画面的哪些位置推动（0 到 1）；不连接则作用于整个画面。",
    ),
]
