"""Tiny OmniLMM and MiniCPM-V models in PyTorch, under the names of their public files.

The language models are transformers' Mistral and Granite, which computes what MiniCPM does; towers and
resampler are written here.
"""

import functools
import json
import math

import numpy as np
import oracle
import tiny
import torch
import transformers
from parity.torch_models import randomised
from parity.vision_models import Eva02, Hub
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from torch import nn
from torch.nn import functional

WIDTH, QUERIES, PATCH, GRID, SIZE = 128, 4, 6, 5, 48  # SIZE: pixels a side, 8 patches
TOWER = {"width": 32, "layers": 2, "heads": 16, "mlp": 48, "patch": PATCH, "grid": GRID}
TEXT = {
    "vocab_size": 328,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALES = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32}
OMNILMM = {
    "model_type": "omnilmm", "architectures": ["OmniLMMForCausalLM"],
    "mm_vision_tower": "eva02_enormous_patch14_clip_224.laion2b_plus", "use_mm_proj": True,
    "num_query": QUERIES, "image_size": SIZE, "mm_use_im_start_end": True,
    "num_key_value_heads": 2, "sliding_window": 4096, "tie_word_embeddings": False,
}  # fmt: skip
MINICPM_V = {
    "model_type": "minicpmv", "architectures": ["MiniCPMV"], "image_size": SIZE, "query_num": QUERIES,
    "vision_encoder": "vit_so400m_patch14_siglip_384.webli", "mm_use_im_start_end": True,
    "num_key_value_heads": 4, "tie_word_embeddings": False, **SCALES,
}  # fmt: skip
SLICES = {"slice_mode": True, "max_slice_nums": 9, "scale_resolution": SIZE, "patch_size": PATCH}
SYSTEMS = {
    "omnilmm": OMNILMM,
    "minicpm-v-1.0": MINICPM_V,
    "minicpm-v-2.0": MINICPM_V | SLICES | {"drop_vision_last_layer": True},
}
SYSTEM = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, and polite answers to the "
    "human's questions."
)
MEANS = {
    "omnilmm": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "minicpmv": ((0.5,) * 3, (0.5,) * 3),
}


def places(height, across, width):
    """Of each place of a grid: sines and cosines of the column, then of the row."""
    speeds = [10000 ** (-4 * k / width) for k in range(width // 4)]
    one = lambda row, column: [
        f(at * s) for at in (column, row) for f in (math.sin, math.cos) for s in speeds
    ]
    return torch.tensor([one(row, column) for row in range(height) for column in range(across)])


class Resampler(nn.Module):
    def __init__(self, adaptive, inner, width, queries):
        super().__init__()
        self.adaptive, self.side = adaptive, math.isqrt(queries)
        self.query = nn.Parameter(torch.empty(queries, width))
        self.kv_proj = nn.Linear(inner, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // 128, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(width, width))
        self.register_buffer("pos_embed", places(self.side, self.side, width))

    def forward(self, x, height, across):  # [batch, rows, tower's width]
        fixed = places(height, across, self.proj.shape[0])
        if not self.adaptive:
            fixed = self.pos_embed.T.reshape(1, -1, self.side, self.side)
            fixed = functional.interpolate(fixed, size=(height, across), mode="bicubic").flatten(2)[0].T
        x = self.ln_kv(self.kv_proj(x))
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        return self.ln_post(self.attn(queries, x + fixed, x)[0]) @ self.proj


class Whole(nn.Module):
    """A system as a whole: pictures to rows, and text with rows to logits.

    Other `settings` of config.json and another tower make it larger; `draw` gives a module its parameters.
    """

    def __init__(self, name, seed=0, tied=False, tower=TOWER, draw=randomised, **settings):
        super().__init__()
        self.name, self.settings = name, {**TEXT, **SYSTEMS[name], "tie_word_embeddings": tied, **settings}
        self.patch, width = tower["patch"], self.settings["hidden_size"]
        self.queries = self.settings.get("num_query") or self.settings["query_num"]
        self.kind = self.settings["model_type"]
        self.scaled = 12 if self.kind == "minicpmv" else 1
        if self.kind == "omnilmm":
            config, cls = transformers.MistralConfig(**self.language()), transformers.MistralForCausalLM
            tower_class = Eva02
        else:
            layers, heads = self.settings["num_hidden_layers"], self.settings["num_attention_heads"]
            scales = {"embedding_multiplier": 12.0, "residual_multiplier": 1.4 / math.sqrt(layers)}
            scales |= {"logits_scaling": width / self.settings["dim_model_base"]}
            scales |= {"attention_multiplier": (width // heads) ** -0.5}
            config, cls = (
                transformers.GraniteConfig(**self.language(), **scales),
                transformers.GraniteForCausalLM,
            )
            tower_class = functools.partial(Hub, siglip=True)
        config._attn_implementation = "eager"
        self.llm = draw(cls(config), seed)
        self.tower = draw(tower_class(**tower), seed + 1)
        resampler = Resampler(name == "minicpm-v-2.0", tower["width"], width, self.queries)
        self.resampler = draw(resampler, seed + 2)
        with torch.no_grad():  # sharp, so that choices are clear, and it speaks up for the end of sequence
            self.llm.get_output_embeddings().weight *= 4 if not tied else 1
        self.eval()

    def language(self):
        own = ("model_type", "architectures", "auto_map")
        return {name: value for name, value in self.settings.items() if name not in own}

    def tensors(self, parameters=False):
        """By public name; only `parameters`, or also what is fixed."""
        prefixes = {
            "omnilmm": ("", "model.vision_tower.", "model.resampler."),
            "minicpmv": ("llm.", "vpm.", "resampler."),
        }[self.kind]
        modules = zip(prefixes, (self.llm, self.tower, self.resampler), strict=True)
        named = (lambda m: m.named_parameters()) if parameters else (lambda m: m.state_dict().items())
        found = {prefix + name: a for prefix, m in modules for name, a in named(m)}
        return {name: a for name, a in found.items() if "attn_pool" not in name}

    def rows(self, picture):
        """[rows, width] of each picture or slice, which are PIL images of the size in which they are seen."""
        mean, std = (torch.tensor(value) for value in MEANS[self.kind])
        x = ((torch.tensor(np.array(picture)).float() / 255 - mean) / std).permute(2, 0, 1)[None]
        state = self.tower.norm(self.tower(x)[-1])
        height, across = (side // self.patch for side in x.shape[2:])
        return self.resampler(state[:, -height * across :], height, across)[0]

    def embeds(self, ids, mark, rows):
        """Embeddings [1, seq, width] as `inputs_embeds`, which Granite multiplies: rows are not scaled."""
        x, here = (
            self.llm.get_input_embeddings()(torch.tensor(ids)),
            [i for i, t in enumerate(ids) if t == mark],
        )
        if rows:
            x = x.clone()
            x[here] = torch.cat(rows) / self.scaled
        else:
            assert not here
        return x[None]


def save(model, directory, dtype=torch.float32, binary=False):
    """The directory of a public checkpoint."""
    describe(model, directory)
    tensors = {name: a.detach().to(dtype).contiguous() for name, a in model.tensors().items()}
    if model.settings["tie_word_embeddings"]:
        del tensors["llm.lm_head.weight"]
    if binary:
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        save_file(tensors, directory / "model.safetensors")


def describe(model, directory):
    """What a public checkpoint has beside its weights."""
    tokenizer(directory, model.kind == "minicpmv")
    (directory / "config.json").write_text(json.dumps(model.settings))


def tokenizer(directory, minicpm):
    """MiniCPM's has its tokens; those of OmniLMM are added when it is loaded."""
    tiny.make_tokenizer(directory)
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": True}))
    if minicpm:
        backend = Backend.from_file(str(directory / "tokenizer.json"))
        names = ("<image>", "</image>", "<slice>", "</slice>")
        backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
        backend.save(str(directory / "tokenizer.json"))


def prompt(name, turns, grids, queries=QUERIES):
    """The published prompt of (role, text) turns; `{}` in a text stands for a picture, whose slices have a
    grid (rows, columns), (0, 0) if there are none."""
    grids = iter(grids)
    if name == "omnilmm":
        picture = lambda: "<im_start>" + "<im_patch>" * queries + "<im_end>"
        said = "".join(f"<|{role}|>\n{filled(text, picture)}</s>\n" for role, text in turns)
        return f"<s><|system|>\n{SYSTEM}</s>\n{said}<|assistant|>\n", "<im_patch>"
    one = "<image>" + "<unk>" * queries + "</image>"

    def picture():
        rows, columns = next(grids) if name == "minicpm-v-2.0" else (0, 0)
        lines = "\n".join([one * columns] * rows)
        return f"{one}<slice>{lines}</slice>" if rows else one

    names = {"user": "<用户>", "assistant": "<AI>"}
    said = "".join(names[role] + filled(text, picture) for role, text in turns)
    return f"<s>{said}<AI>", "<unk>"


def filled(text, picture):
    first, *rest = text.split("{}")
    return first + "".join(picture() + "\n" + part for part in rest)


def expected_inputs(model, directory, turns, seen, grids):
    """inputs_embeds of a dialogue; `seen` are the pictures and slices as the tower sees them."""
    text, mark = prompt(model.name, turns, grids, model.queries)
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    if model.kind == "omnilmm":
        backend.add_special_tokens(
            [AddedToken(t, normalized=False) for t in ("<im_patch>", "<im_start>", "<im_end>")]
        )
    ids = backend.encode(text, add_special_tokens=False).ids
    return model.embeds(ids, backend.token_to_id(mark), [model.rows(picture) for picture in seen])


def squashed(picture):
    return [picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)]


def generate(model, embeds, limit, **settings):
    return oracle.generate(model.llm, [embeds[0].detach()], limit, 2, **settings)[0]
