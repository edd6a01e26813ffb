"""Our models against Hugging Face's and PyTorch's, in float32, with weights our converter carried across."""

import jax
import numpy as np
import pytest
import tiny
import torch
from parity import torch_models
from settings import changed

from omnifusion_jax.batch import UNKNOWN, collate
from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import clip
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import from_foreign
from omnifusion_jax.checkpoints.omnifusion import original
from omnifusion_jax.data.layout import Layout
from omnifusion_jax.models.omnifusion import OmniFusion, abstract
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import AttentionSpec
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training.freeze import split
from omnifusion_jax.training.loss import answer_loss
from omnifusion_jax.training.step import init_state, make_step

C = tiny.config(layout="original")
TABLES = {
    "image/encoders/0": clip.CLIP.table(C.image.encoders[0]),
    "image/adapter": original.adapter_table(C),
    "special": original.SPECIAL_TABLE,
    "decoder": language_models.table(C.decoder),
}
SAMPLES = [
    (
        True,
        [
            (False, "What is in the picture?"),
            (True, "A red circle."),
            (False, "How many?"),
            (True, "Two <unk> circles."),
        ],
    ),
    (False, [(False, "What is it?"), (True, "A blue square to the left of it.")]),
]


def ours(tensors):
    """Arrays by path from tensors by part and name."""
    found = {}
    for part, named in tensors.items():
        named = {name: t.detach().numpy() for name, t in named.items()}
        prefix = clip.PREFIX if part == "image/encoders/0" else ""
        found |= from_foreign(
            named, TABLES[part], shapes_of(C, part), part, ignore=clip.IGNORED, prefix=prefix
        )
    return {path: np.asarray(a) for path, a in found.items()}


def close(a, b):
    a, b = np.asarray(a), b.detach().numpy() if isinstance(b, torch.Tensor) else np.asarray(b)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.fixture(scope="module")
def theirs(tokenizer):
    return torch_models.Original(C, tokenizer)


@pytest.fixture(scope="module")
def arrays(theirs):
    return ours(theirs.tensors())


@pytest.fixture(scope="module")
def model(arrays):
    return nnx.with_parameters(abstract(C), {path: jax.numpy.asarray(a) for path, a in arrays.items()})


@pytest.fixture(scope="module")
def batch(tokenizer):
    return laid_out(tokenizer, SAMPLES)


def laid_out(tokenizer, dialogues):
    layout, picture = Layout(tokenizer, C, 256), tiny.picture(tiny.image(C)[0], C.image.encoders[0].patch)
    roles = {False: "human", True: "gpt"}
    samples = []
    for seen, turns in dialogues:
        dialogue = tiny.dialogue(tuple((roles[a], text) for a, text in turns), *["a.png"] * seen)
        samples.append(layout(dialogue, [picture] * seen))
    return collate(
        samples,
        max(len(s.tokens) for s in samples),
        tiny.tiles(C.image.encoders[0].image_size, rows=C.image.rows),
    )


def pictured(samples):
    return [(tiny.image(C) if seen else None, turns) for seen, turns in samples]


def test_every_hidden_state_of_the_vision_tower(model, theirs):
    images = tiny.image(C, seed=5)
    states = model.image.encoders[0].hidden_states(images)
    with torch.no_grad():
        expected = theirs.clip(
            torch_models.pixels(C.image.encoders[0], images), output_hidden_states=True
        ).hidden_states
    assert len(states) == len(expected) == C.image.encoders[0].layers + 1
    for state, other in zip(states, expected, strict=True):
        close(state, other)
    close(model.image.encoders[0](images), expected[-2][:, 1:])


def test_adapter(model, theirs):
    x = (
        np.random.default_rng(0)
        .normal(size=(2, C.image.encoders[0].patches, C.image.encoders[0].width))
        .astype(np.float32)
    )
    with torch.no_grad():
        close(model.image.adapter(x), theirs.adapter(torch.tensor(x)))


def test_decoder_logits_with_a_window_shorter_than_the_sequence(model, theirs):
    tokens = np.random.default_rng(0).integers(0, C.decoder.vocab, (2, 3 * C.decoder.window))
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    spec = AttentionSpec.of(np.ones_like(tokens), positions, C.decoder.window)
    hidden, _ = model.decoder(model.decoder.embed[...][tokens], spec)
    with torch.no_grad():
        close(model.decoder.logits(hidden), theirs.llm(torch.tensor(tokens)).logits)


def test_logits_of_the_whole_model_with_and_without_a_picture(model, theirs, batch):
    logits = np.asarray(jax.jit(OmniFusion.__call__)(model, batch))
    for row, (image, turns) in zip(logits, pictured(SAMPLES), strict=True):
        with torch.no_grad():
            expected = theirs.logits(image, turns)
        close(row[: len(expected)], expected)


def wanted_gradients(theirs, loss):
    """By path, of a loss in PyTorch."""
    for t in (*theirs.adapter.parameters(), *theirs.llm.parameters(), *theirs.special.values()):
        t.grad = None
    loss.backward()
    return ours(theirs.gradients())


def close_gradients(ours, wanted):
    """By path. That of keys' bias is zero but for rounding, which is measured by that of queries."""
    assert wanted.keys() == ours.keys()
    for path, gradient in wanted.items():
        largest = np.abs(wanted[path.replace("key/bias", "query/bias")]).max()
        assert ours[path].shape == gradient.shape
        np.testing.assert_allclose(ours[path], gradient, rtol=0, atol=2e-5 * largest, err_msg=path)


def test_loss_and_its_gradients(arrays, theirs, batch):
    frozen = {path: a for path, a in arrays.items() if path.startswith("image/encoders/")}

    def loss(trained):
        model = nnx.with_parameters(abstract(C), {**trained, **frozen})
        total, count = answer_loss(model.decoder, model.hidden(batch), batch)
        return total / count

    value, gradients = jax.jit(jax.value_and_grad(loss))(
        {path: a for path, a in arrays.items() if path not in frozen}
    )
    expected = theirs.loss(pictured(SAMPLES))
    wanted = wanted_gradients(theirs, expected)
    assert (batch.kind[batch.weights > 0] == UNKNOWN).any()  # an unknown token is a target
    close(value, expected)
    close_gradients(gradients, wanted)


def test_a_step_with_the_mean_of_the_means_of_micro_batches(arrays, theirs, tokenizer):
    """The published averaging, one dialogue a micro-batch, whatever rows we take at a time: here two, of four
    dialogues of unequal length."""
    c = changed(C, {"image.adapter.dropout": 0.0})
    long = [(False, "What is it?"), (True, "There are two blue circles."), (False, "?"), (True, "A")]
    more = [(True, [(False, "How many?"), (True, "Two.")]), (False, long)]
    samples = SAMPLES + more
    trained, frozen = split(
        (("image/encoders/.*", None), ("(image/adapter|special|decoder)/.*", 1.0)), arrays
    )
    settings = {
        "seed": 0,
        "grad_accum": 2,
        "dtype": np.dtype("float32"),
        "remat": "none",
        "loss_mean_rows": 1,
    }
    step = jax.jit(make_step(abstract(c), OBJECTIVES["answers"], tiny.RECORDER, **settings))
    state, metrics = step(init_state(tiny.RECORDER, trained), frozen, laid_out(tokenizer, samples))
    expected = torch.stack([theirs.loss(pictured([sample])) for sample in samples]).mean()
    wanted = wanted_gradients(theirs, expected)
    close(metrics["loss"], expected)
    over_all = theirs.loss(pictured(samples)).item()
    assert abs(float(metrics["loss"]) - over_all) > 1e-3
    close_gradients(state.optimizer, wanted)
