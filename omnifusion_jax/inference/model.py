"""A model that answers."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.config import GenerationConfig, ModelConfig, check, one_of
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference import decode, prompts, streaming
from omnifusion_jax.inference.logits import knobs, rules
from omnifusion_jax.inference.sampling import words
from omnifusion_jax.models.omnifusion import abstract, cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.stack import unstack
from omnifusion_jax.sharding import mesh_of, sharding, ways

GREEDY = GenerationConfig()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said, or why it could not."""

    text: str = ""
    tokens: list[int] = dataclasses.field(
        default_factory=list
    )  # exactly those that were generated, the end-of-sequence token included where it was
    finish_reason: str = "stop"  # "stop": the model ended it; "length": the limit did, be it by a forced end of sequence; "error"
    logprob: float = (
        0.0  # sum of the tokens' log probabilities by the model's own distribution, before any rule bent it
    )
    error: str | None = None


@jax.jit
def forward(model, batch):
    return model(batch)


class Model:
    """An OmniFusion model ready to answer: a `ModelConfig`, its parameters by path and a `Tokenizer`.

    Where the parameters are spread over a mesh, requests and the KV cache are as well: rows by its axes
    `data` and `fsdp`, heads by `tensor`.
    """

    def __init__(self, config: ModelConfig, arrays, tokenizer, dtype="float32", name=""):
        """`arrays`: every parameter by path, layers stacked, NumPy or JAX; kept as `dtype`, "float32" or
        "bfloat16" (else ConfigError).

        `name` is what the model is called where its answers are kept.
        """
        one_of("dtype", dtype, ("float32", "bfloat16"))
        self.config, self.tokenizer, self.dtype, self.name = config, tokenizer, dtype, name
        self.mesh = mesh_of(arrays.values())
        self.prepare = Prepare.of(tokenizer, config, config.decoder.max_length)
        module = nnx.with_parameters(abstract(config), arrays)
        module.decoder.layers = unstack(module.decoder.layers)
        self.module = jax.tree.map(jnp.asarray, cast(module, dtype))

    def generate(self, requests, generation=GREEDY, *, batch_size=16, on_error="raise"):
        """Answers a list of Requests, or one. Returns `list[Answer]` in their order.

        Requests of similar length share a batch of at most `batch_size`; an answer does not depend on its
        neighbours. All pictures are in memory at once (at 336 pixels 340 kB each): give very long lists in
        portions. What is drawn at random follows from `generation.seed` and a request's id, or from its place
        in the list where it has none.

        Raises DataError for a request that cannot be used, counted from 0 (`request 3`); with
        `on_error="record"` its Answer tells the error, and the others are answered. Raises ConfigError for a
        `generation` that does not fit the vocabulary.
        """
        one_of("on_error", on_error, ("raise", "record"))
        answers, samples, follow = {}, {}, self._rules(generation)
        requests = prompts.as_list(requests)
        for i, request in enumerate(requests):
            try:
                samples[i] = self._question(request, f"request {i}", generation)
            except DataError as error:
                if on_error == "raise":
                    raise
                answers[i] = Answer(finish_reason="error", error=str(error))
        for chunk in prompts.chunks(samples, batch_size):
            names = [i if requests[i].id is None else str(requests[i].id) for i in chunk]
            state = self._start([samples[i] for i in chunk], names, generation, follow)
            state = self._advance(state, generation.max_new_tokens, follow)
            columns = jax.device_get(state.search.best())
            answers.update(
                (i, self._answer(generation, *row)) for i, *row in zip(chunk, *columns, strict=False)
            )  # blank rows are left out
        return [answers[i] for i in sorted(answers)]

    def stream(self, request, generation=GREEDY):
        """Yields the answer's text piece by piece, never a part of a character; together the pieces are the text that `generate` gives.

        Raises DataError for a request that cannot be used and ConfigError for beams, before anything is yielded.
        """
        check(
            generation.num_beams == 1,
            f"streaming needs num_beams=1, not {generation.num_beams}: which beam wins is known at the end only",
        )
        follow = self._rules(generation)
        sample = self._question(request, "request", generation)
        state = self._start([sample], [0 if request.id is None else str(request.id)], generation, follow)
        return streaming.pieces(self.tokenizer, self._tokens(state, generation, follow))

    def logits(self, requests, *, batch_size=4):
        """Scores of every next token to a list of Requests, or one, without sampling: a list of float32[T,
        vocab] NumPy arrays.

        T is the length of the whole laid-out sequence, feature rows and special vectors included. The last
        turn may be the assistant's; else the sequence ends where an answer would begin. Raises DataError for
        a request that cannot be used.
        """
        samples = {
            i: prompts.lay_out(request, f"request {i}", self.prepare)
            for i, request in enumerate(prompts.as_list(requests))
        }
        found = {}
        for chunk in prompts.chunks(samples, batch_size):
            batch = self._assemble([samples[i] for i in chunk], left=False)
            with self._spread():
                scores = np.asarray(forward(self.module, batch))
            found.update((i, scores[row, : len(samples[i].tokens)].copy()) for row, i in enumerate(chunk))
        return [found[i] for i in sorted(found)]

    def _rules(self, generation):
        return rules(
            generation, self.tokenizer, self.config.decoder.vocab, prompts.bucket(generation.max_new_tokens)
        )

    def _question(self, request, where, generation):
        """A Sample that ends where the answer begins, with room for it."""
        sample = prompts.lay_out(request, where, self.prepare, ask=True)
        length, new, most = len(sample.tokens), generation.max_new_tokens, self.config.decoder.max_length
        if length + new > most:
            raise DataError(
                f"{where}: {length} tokens and max_new_tokens {new} exceed the model's {most}. Shorten the dialogue or the answer"
            )
        return sample

    def _start(self, samples, names, generation, follow):
        batch = self._assemble(samples, left=True)
        drawn = np.zeros((len(batch.tokens), 2), np.uint32)
        drawn[: len(names)] = [words(name) for name in names]
        with self._spread():
            x = decode.embed(self.module, batch)
            return decode.start(
                self.module.decoder,
                x,
                batch.segments,
                batch.positions,
                drawn,
                knobs(generation, follow.room),
                follow,
            )

    def _advance(self, state, until, follow):
        with self._spread():
            return decode.advance(self.module.decoder, state, np.int32(until), follow)

    def _assemble(self, samples, left):
        """The Batch of some Samples, each row where it is worked on."""
        if self.mesh is None:
            return prompts.assemble(samples, self.prepare, left)
        batch = prompts.assemble(samples, self.prepare, left, ways(self.mesh, "batch"))
        return jax.tree.map(
            lambda a: jax.device_put(a, sharding(self.mesh, ("batch", *(None,) * (a.ndim - 1)), a.shape)),
            batch,
        )

    def _spread(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _tokens(self, state, generation, follow):
        """Yields the token ids of the first row as they are chosen."""
        for step in range(1, generation.max_new_tokens + 1):
            if step > 1:
                state = self._advance(state, step, follow)
            tokens, done = jax.device_get((state.search.tokens, state.search.done))
            yield int(tokens[0, step - 1])
            if done[0]:
                return

    def _answer(self, generation, tokens, length, logprob):
        tokens = tokens[:length].tolist()
        ended = tokens[-1:] == [self.tokenizer.eos] and not (
            generation.forced_eos and length == generation.max_new_tokens
        )
        return Answer(self.tokenizer.decode(tokens), tokens, "stop" if ended else "length", float(logprob))
