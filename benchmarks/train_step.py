"""Measures training steps, beside PyTorch's of the same shape on a batch of the same shape.

python benchmarks/train_step.py [small] [7b] [tiny:sft ...] [--steps=8] [--tiny]

Cases: `small`, a decoder of 60 million parameters in float32; `7b`, Mistral-7B on full rows of 2048 tokens in
bfloat16, with parameters and moments of AdamW in float32; or the name of a shipped config, measured alone.

Ours and PyTorch's (transformers, fused attention, fused AdamW) are processes of their own, started as a user
starts them: ours with huge pages, as the training command has them. They take turns of some steps, the first
of which does not count: what a process gave back between two of its steps, a virtual machine may have given
to others in the pause. A case that fits a device only alone is measured one after the other. --tiny shrinks
the cases: it shows that they run.
"""

import argparse
import os
import statistics
import time
from typing import NamedTuple

from sides import Side, be, machine

from omnifusion_jax.cli import huge_pages

GIB = 2**30
TURN = 4  # steps that count of each turn


class Case(NamedTuple):
    decoder: dict  # fields of a DecoderConfig
    rows: int
    length: int
    dtype: str
    remat: str = "none"
    turns: bool = True  # whether both fit the device at once


CASES = {
    "small": Case(
        {"width": 512, "layers": 8, "heads": 8, "kv_heads": 8, "head_dim": 64, "mlp": 1536}, 4, 600, "float32"
    ),
    "7b": Case({}, 4, 2048, "bfloat16", remat="full", turns=False),
}
TINY = {"vocab": 320, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 96}


def case_of(name, tiny):
    case = CASES[name]
    return case._replace(decoder=TINY, rows=2, length=64) if tiny else case


def config_of(case):
    """A TrainConfig that trains a decoder alone; its encoder is small and sees nothing."""
    from omnifusion_jax import config as c

    encoder = c.EncoderConfig(image_size=28, patch=14, width=64, layers=1, heads=1, mlp=64)
    decoder = c.DecoderConfig(**case.decoder)
    return c.TrainConfig(
        batch_size=case.rows,
        model=c.ModelConfig(image=c.ImageConfig((encoder,)), decoder=decoder),
        train_parts=((r"decoder/.*", 1.0), (r"(image|special)/.*", None)),
        compute_dtype=case.dtype,
        remat=case.remat,
        data=c.DataConfig(path="random", max_length=case.length),
    ).validate()


def random_batch(config, pictures, pools):
    """Rows of random tokens, each after one picture if `pictures`; every token but the first is a target."""
    import numpy as np

    from omnifusion_jax.batch import FEATURE, TEXT, Batch

    rng, image = np.random.default_rng(0), config.model.image
    rows, length, features = config.batch_size, config.data.max_length, image.rows * pictures
    kind = np.full((rows, length), TEXT, np.int32)
    kind[:, 10 : 10 + features] = FEATURE
    index, of_pool = np.zeros_like(kind), rows // pools
    first = np.arange(rows)[:, None] % of_pool * features  # where a row's picture begins in its pool
    index[:, 10 : 10 + features] = first + np.arange(features)
    weights = (kind == TEXT).astype(np.float32)
    weights[:, 0] = 0
    tokens = rng.integers(3, config.model.decoder.vocab, (rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    shapes = [(pools, of_pool * pictures, view.size, view.size, 3) for view in image.views]
    media = {"image": tuple(rng.integers(0, 256, shape, np.uint8) for shape in shapes)}
    items = np.full(rows, int(pictures), np.int32)
    return Batch(tokens, kind, index, weights, np.ones_like(kind), positions, items, media)


def ours(name, tiny):
    """(what makes a step and returns its loss, facts about it), by the program that a run executes."""
    import jax
    import jax.numpy as jnp

    from omnifusion_jax import sharding, shipped
    from omnifusion_jax.models.presets import resolve
    from omnifusion_jax.training import meters, start
    from omnifusion_jax.training.program import make_program
    from omnifusion_jax.training.step import batch_sharding

    config = config_of(case_of(name, tiny)) if name in CASES else shipped.load(name)
    config.model, config.data.path = resolve(config.model), config.data.path or "random"
    config.validate()
    mesh = sharding.make_mesh(**vars(config.mesh))
    program = make_program(config, mesh, tell=print)
    trained, frozen = start.starting(config, mesh, {})
    state = start.begin(program, trained)
    del trained
    pools = config.grad_accum * sharding.ways(mesh, "batch")
    batch = jax.device_put(random_batch(config, name not in CASES, pools), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = program.step.lower(state, frozen, batch).compile()

    def step():
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        step.metrics = jax.device_get(jax.block_until_ready((state, metrics))[1])
        return step.metrics["loss"].item()

    def facts():
        size = (256 if tiny else 2048) if mesh.devices.flat[0].platform == "cpu" else 8192
        return {
            "flops": sum(float(value) for key, value in step.metrics.items() if key.startswith("flops/")),
            "tokens": int(step.metrics["tokens"]),
            "peak": meters.peak(config, mesh, print),
            "products": mesh.size * matmul_rate(jnp.ones((size, size), config.compute_dtype)),
            "device": mesh.devices.flat[0].device_kind,
        }

    return step, lambda: meters.memory(mesh.local_devices), facts


def matmul_rate(a):
    """Floating-point operations a second of a product of square matrices on one device, the best of five."""
    import jax

    product, seconds = jax.jit(lambda a: a @ a), []
    for _ in range(6):
        before = time.perf_counter()
        jax.block_until_ready(product(a))
        seconds.append(time.perf_counter() - before)
    return 2 * len(a) ** 3 / min(seconds[1:])


def theirs(name, tiny):
    """The same of PyTorch and transformers."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from omnifusion_jax.training.meters import resident

    case, config = case_of(name, tiny), config_of(case_of(name, tiny))
    d, device = config.model.decoder, "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = MistralForCausalLM(
            MistralConfig(
                vocab_size=d.vocab,
                hidden_size=d.width,
                intermediate_size=d.mlp,
                num_hidden_layers=d.layers,
                num_attention_heads=d.heads,
                num_key_value_heads=d.kv_heads,
                head_dim=d.head_dim,
                sliding_window=d.window,
                use_cache=False,
                attn_implementation="sdpa",
            )
        ).train()
    if case.remat != "none":
        model.gradient_checkpointing_enable()
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), o.learning_rate, (0.9, o.beta2), weight_decay=o.weight_decay, fused=True
    )
    tokens = torch.tensor(random_batch(config, False, 1).tokens, dtype=torch.long, device=device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        optimizer.step()
        return loss.item()  # which waits for the step

    memory = torch.cuda.max_memory_allocated if device == "cuda" else resident
    return step, memory, dict


SIDES = {"ours": ours, "PyTorch": theirs}


def asked(side, name, tiny):
    """What a side can be asked."""
    step, memory, facts = SIDES[side](name, tiny)

    def timed():
        before = time.perf_counter()
        loss = step()
        return {"loss": loss, "seconds": time.perf_counter() - before, "memory": memory()}

    return {"step": timed, "facts": facts}


def begin(side, name, tiny):
    """A side, as a user starts it."""
    tunables = None
    if side == "ours":
        tunables = huge_pages.wanted(
            os.environ, huge_pages.glibc(), huge_pages.mode(), huge_pages.accelerators()
        )
    words = [__file__, name, f"--side={side}", *["--tiny"] * tiny]
    return Side(words, os.environ | ({huge_pages.TUNABLES: tunables} if tunables else {}))


def measure(name, steps, tiny):
    """{side: its steps that count}, {side: its first step}, and facts about the model."""
    names = list(SIDES) if name in CASES else ["ours"]
    together = name not in CASES or CASES[name].turns
    found, first, facts = {side: [] for side in names}, {}, {}
    for group in [names] if together else [[side] for side in names]:
        sides = {side: begin(side, name, tiny) for side in group}
        first |= {side: one.ask("step") for side, one in sides.items()}  # compiles
        for done in range(0, steps, TURN):
            for side, one in sides.items():
                one.ask("step")
                found[side] += [one.ask("step") for _ in range(min(TURN, steps - done))]
        for side, one in sides.items():
            facts |= one.ask("facts") if side == "ours" else {}
            one.end()
    return found, first, facts


COLUMNS = ("", "seconds", "least", "most", "tokens/s", "TFLOP/s", "of products", "MFU", "GiB", "loss", "then")


def show(name, found, first, facts):
    tokens, flops = facts["tokens"], facts["flops"]
    print(f"{name}: {tokens:,} tokens and {flops / 1e12:,.4g} TFLOP a step, on {facts['device']}")
    table, medians = [COLUMNS], {}
    for side, steps in found.items():
        seconds = [step["seconds"] for step in steps]
        median = medians[side] = statistics.median(seconds)
        rate = flops / median
        cells = (
            *(f"{value:.4f}" for value in (median, min(seconds), max(seconds))),
            f"{tokens / median:,.0f}",
            f"{rate / 1e12:.4g}",
            f"{rate / facts['products']:.1%}",  # of a large product of matrices, measured here
            f"{rate / facts['peak']:.1%}" if facts["peak"] else "-",
            f"{steps[-1]['memory'] / GIB:.2f}",
            f"{first[side]['loss']:.4f}",
            f"{steps[-1]['loss']:.4f}",
        )
        table.append((side, *cells))
    for side, *cells in table:
        print(f"{side:8}", *(f"{cell:>11}" for cell in cells))
    if len(medians) == 2:
        print(f"PyTorch / ours: {medians['PyTorch'] / medians['ours']:.2f} x")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=["small"], metavar="CASE")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        return be(lambda: asked(given.side, given.cases[0], given.tiny))

    print(machine("jax", "flax", "torch", "transformers"))
    for name in given.cases:
        show(name, *measure(name, given.steps, given.tiny))


if __name__ == "__main__":
    main()
