"""Random networks for differential testing: every operator that a pass knows, in any order.

A network is drawn from a seed. It keeps a pool of values; each step draws an operation that fits
some value and puts the result back. Values with several users, shared layers, in-place operations,
odd sizes and width equal to channels all occur, because careless rewrites break there.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Step = Callable[[list[torch.Tensor]], torch.Tensor]


class RandomGraph(nn.Module):
    """A network drawn from ``seed`` with ``steps`` operations; input ``[2, 4, 6 or 4, 4 to 7]``."""

    def __init__(self, seed: int, steps: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.constants = nn.ParameterList()
        self.plan: list[Step] = []
        self.log: list[str] = []
        self._rng = random.Random(seed)
        torch.manual_seed(seed)
        self.example = torch.randn(2, 4, self._rng.choice((4, 6)), self._rng.choice((4, 5, 6, 7)))
        self.double().eval()
        self.example = self.example.double()
        pool = [self.example]
        for _ in range(steps):
            for _ in range(20):
                drawn = self._draw(pool)
                if drawn is None:
                    continue
                name, step = drawn
                try:
                    with torch.no_grad():
                        value = step(list(pool))
                except (RuntimeError, ValueError):
                    continue
                if value.numel() == 0 or value.numel() > 20000 or value.abs().max() > 1e4:
                    continue
                self.plan.append(step)
                self.log.append(f"{name} -> {tuple(value.shape)}")
                pool.append(value)
                break
        self.outputs = sorted(self._rng.sample(range(1, len(pool)), min(2, len(pool) - 1)))
        if len(pool) - 1 not in self.outputs:
            self.outputs.append(len(pool) - 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        pool = [x]
        for step in self.plan:
            pool.append(step(pool))
        return [pool[i] * 1.0 if i == 0 else pool[i] for i in self.outputs]

    # -- drawing --------------------------------------------------------------------------------

    def _pick(self, pool: list[torch.Tensor]) -> int:
        rng = self._rng
        return len(pool) - 1 if rng.random() < 0.55 else rng.randrange(len(pool))

    def _layer(self, layer: nn.Module) -> nn.Module:
        layer = layer.double().eval()
        for module in layer.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.data.normal_(0, 1)
                module.bias.data.normal_(0, 0.5)
                if self._rng.random() < 0.3:
                    module.weight.data[0] = 0.0
        self.layers.append(layer)
        return layer

    def _constant(self, *shape: int) -> torch.Tensor:
        kind = self._rng.randrange(4)
        data = torch.randn(shape).double()
        if kind == 0:
            data = data.abs() + 0.1
        elif kind == 1:
            data = torch.ones(shape).double() * self._rng.choice((1.0, -1.0, 0.5, 2.0))
        self.constants.append(nn.Parameter(data))
        return self.constants[-1]

    def _draw(self, pool: list[torch.Tensor]) -> tuple[str, Step] | None:
        rng = self._rng
        i = self._pick(pool)
        x = pool[i]
        options = [self._common]
        if x.dim() == 4:
            options += [self._image] * 6
        if x.dim() >= 2:
            options += [self._tokens] * 2 + [self._mixing] * 2
        return rng.choice(options)(pool, i, x)

    def _image(self, pool: list[torch.Tensor], i: int, x: torch.Tensor) -> tuple[str, Step] | None:
        rng = self._rng
        channels = x.shape[1]
        name = rng.choice(
            [
                "conv",
                "conv",
                "conv",
                "conv",
                "norm",
                "norm",
                "norm",
                "pool",
                "maxpool",
                "pad",
                "shuffle",
                "pixel",
                "up",
                "cat",
                "chunk",
                "split",
                "slice",
                "crop",
                "convT",
                "groupnorm",
                "instancenorm",
                "mean",
                "gate",
                "shared",
                "same",
                "prelu",
            ]
        )
        if name in ("conv", "shared"):
            groups = rng.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
            out = rng.choice((channels, channels, 2 * channels, 4))
            if out % groups:
                out = channels
            kernel = (rng.choice((1, 1, 2, 3, 3, 5)), rng.choice((1, 1, 3, 3)))
            dilation = rng.choice((1, 1, 1, 2))
            padding: int | tuple[int, int] | str = (
                rng.choice((0, (kernel[0] - 1) * dilation // 2, 1)),
                rng.choice((0, (kernel[1] - 1) * dilation // 2, 1)),
            )
            stride = rng.choice((1, 1, 1, 2))
            if rng.random() < 0.1 and stride == 1:
                padding = "same"
            mode = rng.choice(("zeros", "zeros", "zeros", "zeros", "reflect", "circular"))
            layer = self._layer(
                nn.Conv2d(
                    channels, out, kernel, stride, padding, dilation, groups,
                    bias=rng.random() < 0.5, padding_mode=mode,
                )
            )  # fmt: skip
            if name == "shared" and out == channels:
                return f"shared {layer} @{i}", lambda p: layer(p[i]) + layer(p[i] * 2.0)
            return f"{layer} @{i}", lambda p: layer(p[i])
        if name == "same":
            kernel_ = rng.choice((1, 3))
            layer = self._layer(
                nn.Conv2d(
                    channels, channels, kernel_, padding=kernel_ // 2, bias=rng.random() < 0.5
                )
            )
            return f"{layer} @{i} + residual", lambda p: layer(p[i]) + p[i]
        if name == "norm":
            layer = self._layer(nn.BatchNorm2d(channels))
            return f"batch_norm @{i}", lambda p: layer(p[i])
        if name == "pool":
            kernel_, pad = rng.choice(((2, 0), (3, 1), (3, 0), (1, 0)))
            include, ceil = rng.random() < 0.6, rng.random() < 0.2
            stride = rng.choice((1, 1, 2))
            return (
                f"avg_pool {kernel_} {stride} {pad} ceil={ceil} include={include} @{i}",
                lambda p: F.avg_pool2d(p[i], kernel_, stride, pad, ceil, include),
            )
        if name == "maxpool":
            return f"max_pool @{i}", lambda p: F.max_pool2d(p[i], 3, 1, 1)
        if name == "pad":
            mode = rng.choice(("constant", "constant", "constant", "reflect", "replicate"))
            amounts = [rng.choice((0, 1, 1, 2)) for _ in range(4)]
            if rng.random() < 0.2:
                amounts[0] = -1
            value = rng.choice((0.0, 0.0, 0.5)) if mode == "constant" else 0.0
            return f"pad {mode} {amounts} {value} @{i}", lambda p: F.pad(p[i], amounts, mode, value)
        if name == "shuffle" and channels % 2 == 0:
            return f"channel_shuffle @{i}", lambda p: F.channel_shuffle(p[i], 2)
        if name == "pixel" and channels % 4 == 0:
            return f"pixel_shuffle @{i}", lambda p: F.pixel_shuffle(p[i], 2)
        if name == "up":
            mode = rng.choice(("nearest", "bilinear"))
            return f"resize {mode} @{i}", lambda p: F.interpolate(p[i], scale_factor=2, mode=mode)
        if name == "cat":
            same = [j for j, v in enumerate(pool) if v.dim() == 4 and v.shape[2:] == x.shape[2:]]
            j = rng.choice(same)
            return f"cat @{i} @{j}", lambda p: torch.cat([p[i], p[j]], 1)
        if name == "chunk" and channels % 2 == 0:
            which = rng.randrange(2)
            return f"chunk {which} @{i}", lambda p: p[i].chunk(2, 1)[which]
        if name == "split" and channels > 2:
            layer = self._layer(nn.Conv2d(channels // 2, channels // 2, 3, padding=1))
            rest = channels - channels // 2

            def partial(p: list[torch.Tensor]) -> torch.Tensor:
                a, b = torch.split(p[i], [channels // 2, rest], 1)
                return torch.cat([layer(a), b], 1)

            return f"partial conv @{i}", partial
        if name == "slice":
            return f"slice @{i}", lambda p: p[i][:, : max(1, channels // 2)]
        if name == "crop":
            step = rng.choice((1, 2))
            start = rng.choice((0, 1))
            return f"crop {start} {step} @{i}", lambda p: p[i][:, :, start::step, start:]
        if name == "convT":
            groups = rng.choice([g for g in (1, 2) if channels % g == 0])
            layer = self._layer(
                nn.ConvTranspose2d(channels, channels, rng.choice((2, 3)), 2, groups=groups)
            )
            return f"{layer} @{i}", lambda p: layer(p[i])
        if name == "groupnorm":
            layer = self._layer(nn.GroupNorm(1, channels))
            return f"group_norm @{i}", lambda p: layer(p[i])
        if name == "instancenorm":
            layer = self._layer(nn.InstanceNorm2d(channels, affine=True))
            return f"instance_norm @{i}", lambda p: layer(p[i])
        if name == "mean":
            keep = rng.random() < 0.5
            return f"mean {keep} @{i}", lambda p: p[i].mean((2, 3), keepdim=keep)
        if name == "gate":
            return f"gate @{i}", lambda p: p[i] * p[i].mean((2, 3), keepdim=True).sigmoid()
        if name == "prelu":
            layer = self._layer(nn.PReLU(channels))
            return f"prelu @{i}", lambda p: layer(p[i])
        return None

    def _tokens(self, pool: list[torch.Tensor], i: int, x: torch.Tensor) -> tuple[str, Step] | None:
        rng = self._rng
        last = x.shape[-1]
        name = rng.choice(
            [
                "linear",
                "linear",
                "layernorm",
                "rmsnorm",
                "lora",
                "transpose",
                "flatten",
                "bn1d",
                "view",
            ]
        )
        if name == "linear":
            layer = self._layer(nn.Linear(last, rng.choice((last, 4)), bias=rng.random() < 0.5))
            return f"linear @{i}", lambda p: layer(p[i])
        if name == "lora":
            layer = self._layer(nn.Linear(last, last))
            down = self._layer(nn.Linear(last, 2, bias=False))
            up = self._layer(nn.Linear(2, last, bias=False))
            return f"lora @{i}", lambda p: layer(p[i]) + up(down(p[i])) * 0.5
        if name == "layernorm":
            layer = self._layer(nn.LayerNorm(last, elementwise_affine=rng.random() < 0.7))
            return f"layer_norm @{i}", lambda p: layer(p[i])
        if name == "rmsnorm":
            layer = self._layer(nn.RMSNorm(last))
            return f"rms_norm @{i}", lambda p: layer(p[i])
        if name == "transpose" and x.dim() > 2:
            return f"transpose @{i}", lambda p: p[i].transpose(1, -1)
        if name == "flatten" and x.dim() > 2:
            return f"flatten @{i}", lambda p: p[i].flatten(1)
        if name == "bn1d" and x.dim() in (2, 3):
            layer = self._layer(nn.BatchNorm1d(x.shape[1]))
            return f"batch_norm1d @{i}", lambda p: layer(p[i])
        if name == "view" and x.dim() == 3 and last % 2 == 0:
            return f"view @{i}", lambda p: p[i].reshape(p[i].shape[0], -1, 2, last // 2)
        return None

    def _mixing(self, pool: list[torch.Tensor], i: int, x: torch.Tensor) -> tuple[str, Step] | None:
        """Products of two tensors, joints with constants, and what moves or masks elements."""
        rng = self._rng
        channels, last = x.shape[1], x.shape[-1]
        tail = (1,) * (x.dim() - 2)
        name = rng.choice(
            [
                "cat constant",
                "cat twice",
                "roll",
                "flip",
                "pick",
                "repeat",
                "where",
                "mask",
                "stack",
                "compare",
                "square",
                "scores",
                "einsum",
                "attention",
                "left",
                "bmm",
                "cumsum",
                "assign",
                "unbind",
                "clamp",
                "depthwise",
                "sum",
            ]
        )
        if name == "cat constant":
            c = self._constant(1, channels, *x.shape[2:])
            order = rng.choice(((0, 1), (1, 0), (0, 1, 0), (1, 0, 1)))

            def joined(p: list[torch.Tensor]) -> torch.Tensor:
                parts = (p[i], c.expand(p[i].shape))
                return torch.cat([parts[k] for k in order], 1)

            return f"cat constant {order} @{i}", joined
        if name == "cat twice":
            return f"cat twice @{i}", lambda p: torch.cat([p[i], p[i]], 1)
        if name == "roll":
            axis, by = rng.randrange(1, x.dim()), rng.choice((1, 2))
            return f"roll {axis} @{i}", lambda p: p[i].roll(by, axis)
        if name == "flip":
            axis = rng.randrange(1, x.dim())
            return f"flip {axis} @{i}", lambda p: p[i].flip(axis)
        if name == "pick":
            at = torch.tensor([rng.randrange(channels) for _ in range(channels)])
            return f"pick {at.tolist()} @{i}", lambda p: p[i][:, at]
        if name == "repeat":
            return f"repeat @{i}", lambda p: p[i].repeat_interleave(2, 1)
        if name == "where":
            hidden = torch.rand(1, channels, *x.shape[2:]) < 0.3
            value = rng.choice((0.0, 0.0, 1.0, -2.0))
            return f"where {value} @{i}", lambda p: p[i].masked_fill(hidden, value)
        if name == "mask":
            keep = (torch.rand(channels, *tail) < 0.6).double()
            self.constants.append(nn.Parameter(keep))
            return f"mask @{i}", lambda p: p[i] * keep
        if name == "stack":
            same = [j for j, v in enumerate(pool) if v.shape == x.shape]
            j, weights = rng.choice(same), self._constant(2, *(1,) * x.dim())
            return f"stack @{i} @{j}", lambda p: (torch.stack([p[i], p[j]]) * weights).sum(0)
        if name == "compare":
            c = self._constant(channels, *tail)
            return f"compare @{i}", lambda p: (p[i] > c).to(p[i].dtype)
        if name == "square":
            return f"square @{i}", lambda p: p[i] * p[i].tanh()
        if name == "sum" and x.dim() > 2:
            return f"sum @{i}", lambda p: p[i].sum(-1)
        if name == "cumsum":
            return f"cumsum @{i}", lambda p: p[i].cumsum(-1)
        if name == "clamp":
            low, high = rng.choice(((0.0, None), (-1.0, 1.0), (None, 0.5)))
            return f"clamp {low} {high} @{i}", lambda p: p[i].clamp(low, high)
        if name == "unbind" and x.dim() > 2:
            return f"unbind @{i}", lambda p: p[i].unbind(-1)[0] - p[i].unbind(-1)[-1]
        if name == "assign":
            c = self._constant(channels, *tail)

            def assign(p: list[torch.Tensor]) -> torch.Tensor:
                y = p[i].clone()
                y[:, ::2] = (p[i] * c)[:, ::2]
                return y

            return f"assign @{i}", assign
        if name == "left" and x.dim() == 3:
            c = self._constant(rng.choice((channels, 3)), channels)
            return f"left @{i}", lambda p: c @ p[i]
        if name == "depthwise" and x.dim() == 3:
            layer = self._layer(nn.Conv1d(channels, channels, 3, padding=1, groups=channels))
            return f"conv1d @{i}", lambda p: layer(p[i])
        if name in ("scores", "einsum", "attention", "bmm") and x.dim() == 3:
            q, k, v = (self._layer(nn.Linear(last, last, bias=rng.random() < 0.7)) for _ in "qkv")
            scale = rng.choice((0.5, 2.0, -1.0))

            def attend(p: list[torch.Tensor]) -> torch.Tensor:
                a, b, c = q(p[i]), k(p[i]), v(p[i])
                if name == "attention":
                    return F.scaled_dot_product_attention(a, b, c, is_causal=scale < 0)
                if name == "einsum":
                    scores = torch.einsum("bid,bjd->bij", a, b) * scale
                    return torch.einsum("bij,bjd->bid", scores.softmax(-1), c)
                if name == "bmm":
                    return torch.bmm(torch.baddbmm(a @ a.mT, a, b.mT, alpha=scale), c)
                return (a @ b.transpose(1, 2) / scale).softmax(-1) @ c

            return f"{name} {scale} @{i}", attend
        return None

    def _common(self, pool: list[torch.Tensor], i: int, x: torch.Tensor) -> tuple[str, Step] | None:
        rng = self._rng
        name = rng.choice(
            [
                "add",
                "sub",
                "radd",
                "const",
                "const",
                "scalar",
                "act",
                "act",
                "act",
                "addcmul",
                "residual",
                "inplace",
            ]
        )
        if name in ("add", "sub", "radd", "residual"):
            same = [j for j, v in enumerate(pool) if v.shape == x.shape]
            j = rng.choice(same)
            alpha = rng.choice((1.0, 1.0, 1.0, 0.5, -2.0))
            if name == "sub":
                return f"sub @{i} @{j}", lambda p: p[i] - p[j]
            return f"add {alpha} @{i} @{j}", lambda p: torch.add(p[i], p[j], alpha=alpha)
        if name == "const":
            shapes: list[tuple[int, ...]] = [(1,), (x.shape[-1],), ()]
            if x.dim() == 4:
                shapes += [(x.shape[1], 1, 1), (1, x.shape[1], 1, 1), (1, x.shape[1], 1, 1)]
            if x.dim() == 3:
                shapes += [(1, x.shape[1], 1), tuple(x.shape[1:])]
            c = self._constant(*rng.choice(shapes))
            which = rng.randrange(6)
            functions: list[tuple[str, Step]] = [
                ("x*c", lambda p: p[i] * c),
                ("c*x", lambda p: c * p[i]),
                ("x+c", lambda p: p[i] + c),
                ("c-x", lambda p: c - p[i]),
                ("x/c", lambda p: p[i] / (c.abs() + 0.5)),
                ("x-c", lambda p: torch.sub(p[i], c, alpha=2)),
            ]
            label, step = functions[which]
            return f"{label} {tuple(c.shape)} @{i}", step
        if name == "scalar":
            a = rng.choice((0.5, 1.0, -1.0, 3.0))
            return f"scalar {a} @{i}", lambda p: a - p[i] * a
        if name == "addcmul" and x.dim() == 4:
            g, h = self._constant(x.shape[1], 1, 1), self._constant(x.shape[1], 1, 1)
            return f"addcmul @{i}", lambda p: torch.addcmul(h, p[i], g, value=0.5)
        if name == "act":
            label, function = rng.choice(
                [
                    ("relu", F.relu), ("relu6", F.relu6), ("gelu", F.gelu), ("silu", F.silu),
                    ("leaky", F.leaky_relu), ("tanh", torch.tanh), ("neg", torch.neg),
                ]
            )  # fmt: skip
            return f"{label} @{i}", lambda p: function(p[i])
        if name == "inplace":

            def inplace(p: list[torch.Tensor]) -> torch.Tensor:
                y = p[i] * 1.5
                y[:, :1] = 0.25
                y.relu_()
                return y

            return f"inplace @{i}", inplace
        return None
