"""Vision transformers that transformers has no class for, in PyTorch.

Names are those of their files. All hidden states are given; the first is the input of the first block.
"""

import math

import torch
from torch import nn
from torch.nn import functional


def attention(qkv, heads, norm=lambda q, k: (q, k)):
    """[batch, seq, 3 * width] to [batch, seq, width]"""
    q, k, v = qkv.chunk(3, dim=-1)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (*norm(q, k), v))
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Part(nn.Module):
    """Named parameters and modules, nothing else."""

    def __init__(self, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, torch.Tensor) else member)


class Hub(nn.Module):
    """The original DINOv2, and timm's SigLIP: without class token and LayerScale, and with antialiasing."""

    def __init__(self, width, layers, heads, mlp, patch, grid, registers=0, gated=False, siglip=False):
        super().__init__()
        self.heads, self.grid, self.siglip, self.gated, self.registers = heads, grid, siglip, gated, registers
        self.patch_embed = Part(proj=nn.Conv2d(3, width, patch, patch))
        self.pos_embed = nn.Parameter(torch.empty(1, grid**2 + (not siglip), width))
        if siglip:
            self.attn_pool = Part(latent=torch.empty(1, 1, width))
        else:
            self.cls_token, self.mask_token = (
                nn.Parameter(torch.empty(1, 1, width)),
                nn.Parameter(torch.empty(1, width)),
            )
        if registers:
            self.register_tokens = nn.Parameter(torch.empty(1, registers, width))
        self.blocks = nn.ModuleList(self.block(width, mlp) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def block(self, width, mlp):
        scales = (
            {}
            if self.siglip
            else {"ls1": Part(gamma=torch.empty(width)), "ls2": Part(gamma=torch.empty(width))}
        )
        plain = {"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)}
        return Part(
            norm1=nn.LayerNorm(width, eps=1e-6),
            norm2=nn.LayerNorm(width, eps=1e-6),
            attn=Part(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)),
            mlp=Part(
                **({"w12": nn.Linear(width, 2 * mlp), "w3": nn.Linear(mlp, width)} if self.gated else plain)
            ),
            **scales,
        )

    def positions(self, height, width):
        """There are two libraries and three ways.

        timm antialiases, so does DINOv2 with registers; without them it asks for 0.1 of a patch more.
        """
        first, table = self.pos_embed[:, : not self.siglip], self.pos_embed[:, (not self.siglip) :]
        if (height, width) == (self.grid, self.grid):
            return first, table
        table = table.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        if self.registers or self.siglip:
            table = functional.interpolate(table, size=(height, width), mode="bicubic", antialias=True)
        else:
            table = functional.interpolate(table, scale_factor=(height + 0.1) / self.grid, mode="bicubic")
        return first, table.flatten(2).transpose(1, 2)

    def feed_forward(self, mlp, x):
        if not self.gated:
            return mlp.fc2(functional.gelu(mlp.fc1(x)))
        gate, up = mlp.w12(x).chunk(2, dim=-1)
        return mlp.w3(functional.silu(gate) * up)

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels)
        first, positions = self.positions(*x.shape[-2:])
        x = x.flatten(2).transpose(1, 2) + positions
        if not self.siglip:
            before = [self.cls_token + first] + ([self.register_tokens] if self.registers else [])
            x = torch.cat([*(token.expand(len(x), -1, -1) for token in before), x], dim=1)
        states = [x]
        for block in self.blocks:
            y = block.attn.proj(attention(block.attn.qkv(block.norm1(x)), self.heads))
            x = x + (y if self.siglip else y * block.ls1.gamma)
            y = self.feed_forward(block.mlp, block.norm2(x))
            x = x + (y if self.siglip else y * block.ls2.gamma)
            states.append(x)
        return states


class Eva02(nn.Module):
    """timm's EVA02-E: norms after attention and feed-forward part, queries and values alone have a bias."""

    def __init__(self, width, layers, heads, mlp, patch, grid):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.patch_embed = Part(proj=nn.Conv2d(3, width, patch, patch))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, grid**2 + 1, width))
        block = lambda: Part(
            attn=Part(
                qkv=nn.Linear(width, 3 * width, bias=False),
                q_bias=torch.empty(width),
                v_bias=torch.empty(width),
                proj=nn.Linear(width, width),
            ),
            norm1=nn.LayerNorm(width, eps=1e-6),
            mlp=Part(fc1=nn.Linear(width, mlp), fc2=nn.Linear(mlp, width)),
            norm2=nn.LayerNorm(width, eps=1e-6),
        )
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels)
        side, (first, table) = x.shape[-1], self.pos_embed.split([1, self.grid**2], dim=1)
        table = table.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        table = functional.interpolate(table, size=(side, side), mode="bicubic", antialias=True)
        x = x.flatten(2).transpose(1, 2) + table.flatten(2).transpose(1, 2)
        x = torch.cat([(self.cls_token + first).expand(len(x), -1, -1), x], dim=1)
        states = [x]
        for block in self.blocks:
            a = block.attn
            qkv = functional.linear(x, a.qkv.weight, torch.cat([a.q_bias, 0 * a.q_bias, a.v_bias]))
            x = x + block.norm1(a.proj(attention(qkv, self.heads)))
            x = x + block.norm2(block.mlp.fc2(functional.gelu(block.mlp.fc1(x))))
            states.append(x)
        return states


class OpenClip(nn.Module):
    """The vision tower of open_clip, and a few tensors of its text tower."""

    def __init__(self, width, layers, heads, mlp, patch, grid, quick=False):
        super().__init__()
        self.quick = quick
        block = lambda: Part(
            ln_1=nn.LayerNorm(width),
            attn=nn.MultiheadAttention(width, heads, batch_first=True),
            ln_2=nn.LayerNorm(width),
            mlp=Part(c_fc=nn.Linear(width, mlp), c_proj=nn.Linear(mlp, width)),
        )
        self.visual = Part(
            conv1=nn.Conv2d(3, width, patch, patch, bias=False),
            class_embedding=torch.empty(width),
            positional_embedding=torch.empty(grid**2 + 1, width),
            ln_pre=nn.LayerNorm(width),
            transformer=Part(resblocks=nn.ModuleList(block() for _ in range(layers))),
            ln_post=nn.LayerNorm(width),
            proj=torch.empty(width, 8),
        )
        self.logit_scale, self.text_projection = (
            nn.Parameter(torch.empty(())),
            nn.Parameter(torch.empty(8, 8)),
        )
        self.transformer, self.token_embedding = (
            Part(resblocks=nn.ModuleList([Part(ln_1=nn.LayerNorm(8))])),
            nn.Embedding(9, 8),
        )

    def forward(self, pixels):
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = v.ln_pre(torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1) + v.positional_embedding)
        states = [x]
        for block in v.transformer.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False)[0]
            y = block.mlp.c_fc(block.ln_2(x))
            x = x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y) if self.quick else functional.gelu(y))
            states.append(x)
        return states


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class InternViT(nn.Module):
    """As OpenGVLab published it."""

    def __init__(self, width, layers, heads, mlp, patch, grid, rms=True):
        super().__init__()
        self.heads, self.rms = heads, rms
        norm = RMSNorm if rms else lambda width: nn.LayerNorm(width, eps=1e-6)
        normed = lambda: {"q_norm": RMSNorm(width), "k_norm": RMSNorm(width)} if rms else {}
        block = lambda: Part(
            attn=Part(
                qkv=nn.Linear(width, 3 * width, bias=not rms), proj=nn.Linear(width, width), **normed()
            ),
            mlp=Part(fc1=nn.Linear(width, mlp), fc2=nn.Linear(mlp, width)),
            norm1=norm(width),
            norm2=norm(width),
            ls1=torch.empty(width),
            ls2=torch.empty(width),
        )
        self.embeddings = Part(
            class_embedding=torch.empty(1, 1, width),
            patch_embedding=nn.Conv2d(3, width, patch, patch),
            position_embedding=torch.empty(1, grid**2 + 1, width),
        )
        self.encoder = Part(layers=nn.ModuleList(block() for _ in range(layers)))

    def forward(self, pixels):
        e = self.embeddings
        x = e.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([e.class_embedding.expand(len(x), -1, -1), x], dim=1) + e.position_embedding
        states = [x]
        for block in self.encoder.layers:
            a = block.attn
            norm = (lambda q, k, a=a: (a.q_norm(q), a.k_norm(k))) if self.rms else (lambda q, k: (q, k))
            x = x + a.proj(attention(a.qkv(block.norm1(x)), self.heads, norm)) * block.ls1
            x = x + block.mlp.fc2(functional.gelu(block.mlp.fc1(block.norm2(x)))) * block.ls2
            states.append(x)
        return states


class Described:
    """What EncoderConfig says of norms after each part, keys without a bias and turned positions.

    One operation comes after the other. Parameters are read from ours by name.
    """

    def __init__(self, c, arrays):
        self.c, self.p = c, {path: torch.tensor(a) for path, a in arrays.items()}

    def linear(self, x, name, i, dims=1):
        """A linear map of layer i, whose kernel has `dims` dimensions on the side of what comes in."""
        kernel = self.p[f"layers/{name}/kernel"][i]
        y = x @ kernel.reshape(math.prod(kernel.shape[:dims]), -1)
        return y + self.p[f"layers/{name}/bias"][i].reshape(-1) if f"layers/{name}/bias" in self.p else y

    def norm(self, x, name, i=None):
        scale, bias = (
            self.p[f"{name}/{kind}"] if i is None else self.p[f"layers/{name}/{kind}"][i]
            for kind in ("scale", "bias")
        )
        return functional.layer_norm(x, scale.shape, scale, bias, self.c.eps)

    def turned(self, x):
        """Turns queries or keys [batch, heads, seq, size]: each pair of neighbours is a complex number."""
        c, size = self.c, x.shape[-1]
        if c.rope_theta is None:
            return x
        first = c.class_token + c.registers
        speeds = [c.rope_theta ** (-4 * k / size) for k in range(size // 4)]
        step = c.rope_grid / c.side  # of a patch, on the grid that was trained
        angles = torch.tensor(
            [
                [at * step * speed for at in (row, column) for speed in speeds]
                for row in range(c.side)
                for column in range(c.side)
            ]
        )
        pairs = torch.view_as_complex(x[:, :, first:].unflatten(-1, (-1, 2)).contiguous())
        patches = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        return torch.cat([x[:, :, :first], patches], dim=2)

    def attention(self, x, i):
        q, k, v = (
            self.linear(x, f"attention/{name}", i).unflatten(-1, (self.c.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        y = functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.linear(y.transpose(1, 2).flatten(2), "attention/out", i, dims=2)

    def feed_forward(self, x, i):
        return self.linear(functional.gelu(self.linear(x, "feed_forward/up", i)), "feed_forward/down", i)

    def __call__(self, pixels):
        c, p = self.c, self.p
        x = (
            functional.conv2d(pixels, p["patch/kernel"].permute(3, 2, 0, 1), stride=c.patch)
            .flatten(2)
            .transpose(1, 2)
        )
        first = [p["class_token"][None] + p["position"][:1], *([p["registers"]] if c.registers else [])]
        x = torch.cat([torch.cat(first).expand(len(x), -1, -1), x + p["position"][1:]], dim=1)
        states = [self.norm(x, "pre_norm")]
        for i in range(c.layers):
            x = states[-1]
            for part, norm in ((self.attention, "norm1"), (self.feed_forward, "norm2")):
                x = x + (
                    self.norm(part(x, i), norm, i)
                    if c.norm_order == "post"
                    else part(self.norm(x, norm, i), i)
                )
            states.append(x)
        return states
