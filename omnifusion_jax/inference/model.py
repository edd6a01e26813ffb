"""A model with a tokenizer, ready to answer requests."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np

from omnifusion_jax import hosts
from omnifusion_jax.config import GenerationConfig, ModelConfig, check, one_of
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference import decode, options, prompts, streaming
from omnifusion_jax.models.answering import answering
from omnifusion_jax.sharding import mesh_of, sharding, ways

GREEDY = GenerationConfig()


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of the model, or the error that prevented it."""

    text: str = ""
    # exactly the generated tokens, with the end-of-sequence token if it was generated
    tokens: list[int] = dataclasses.field(default_factory=list)
    # "stop": the model ended the answer; "length": the limit did, also by a forced end of sequence; "error"
    finish_reason: str = "stop"
    # sum of the tokens' log probabilities under the model's distribution, before any logits processor
    logprob: float = 0.0
    error: str | None = None


@jax.jit
def forward(model, batch):
    return model(batch)


class Model:
    """An OmniFusion model ready to answer: a `ModelConfig`, its parameters by path and a `Tokenizer`.

    If the parameters are spread over a mesh, requests and the KV cache are too: rows over the axes `data` and
    `fsdp`, heads over `tensor`.
    """

    def __init__(
        self,
        config: ModelConfig,
        arrays: Mapping[str, np.ndarray | jax.Array],
        tokenizer: Tokenizer,
        dtype: str = "float32",
        name: str = "",
    ):
        """Loads the parameters.

        Args:
          arrays: every parameter by path, as `models.answering` takes them.
          dtype: "float32" or "bfloat16", in which the parameters are kept.
          name: the name of the model that is written beside its answers.

        Raises:
          ConfigError: the dtype is another one.
          CheckpointError: `arrays` does not hold exactly the model's parameters.
        """
        one_of("dtype", dtype, ("float32", "bfloat16"))
        self.config, self.tokenizer, self.dtype, self.name = config, tokenizer, dtype, name
        self.mesh = mesh_of(arrays.values())
        self.prepare = Prepare.of(tokenizer, config, config.decoder.max_length)
        self.module = answering(config, arrays, dtype)

    def generate(
        self,
        requests: Request | Iterable[Request],
        generation: GenerationConfig = GREEDY,
        *,
        batch_size: int = 16,
        on_error: str = "raise",
    ) -> list[Answer]:
        """Answers a list of Requests, or a single one. Returns a list of Answers in the same order.

        Requests of similar length share a batch of at most `batch_size`; an answer does not depend on the
        other requests of its batch. All pictures are in memory at once (340 kB each at 336 pixels): give
        very long lists in portions. Random draws depend on `generation.seed` and the id of the request, or
        on its place in the list if it has no id.

        Raises:
          DataError: a request cannot be used; the message counts requests from 0 (`request 3`). With
            `on_error="record"` the error is kept in the request's Answer, and the others are answered.
          ConfigError: `generation` does not fit the vocabulary, or `on_error` is unknown.
        """
        one_of("on_error", on_error, ("raise", "record"))
        answers, samples, sizes = {}, {}, self._sizes(generation)
        requests = prompts.as_list(requests)
        for i, request in enumerate(requests):
            try:
                samples[i] = prompts.question(
                    request, f"request {i}", self.prepare, generation.max_new_tokens
                )
            except DataError as error:
                if on_error == "raise":
                    raise
                answers[i] = Answer(finish_reason="error", error=str(error))
        for chunk in prompts.chunks(samples, batch_size):
            questions = [prompts.Question(prompts.name_of(requests[i], i), samples[i]) for i in chunk]
            answers |= zip(chunk, self._answers(questions, generation, sizes), strict=True)
        return [answers[i] for i in sorted(answers)]

    def each(
        self,
        requests: Iterable[Request | prompts.Question | DataError],
        generation: GenerationConfig = GREEDY,
        *,
        batch_size: int = 16,
    ) -> Iterator[tuple[int, Answer]]:
        """Answers requests that come as they are pulled, of which there may be any number.

        Yields (number, Answer) as answers are ready, in any order; requests are numbered from 0 as they are
        pulled, which happens when there is room for them among `batch_size`. Those of similar length should
        follow one another. A prompts.Question was laid out elsewhere. A DataError stands for a request that
        cannot be used, and so becomes the error of its Answer, as does that of a Request met here.

        Raises (when called):
          ConfigError: `generation` does not fit the vocabulary.
        """
        sizes = self._sizes(generation)
        return self._each(enumerate(requests), generation, batch_size, sizes)

    def _each(self, numbered, generation, batch_size, sizes):
        while chunk := list(itertools.islice(numbered, batch_size)):
            asked = {}
            for i, request in chunk:
                try:
                    asked[i] = self._question(request, i, generation.max_new_tokens)
                except DataError as error:
                    yield i, Answer(finish_reason="error", error=str(error))
            if asked:
                yield from zip(asked, self._answers([*asked.values()], generation, sizes), strict=True)

    def _question(self, request, number, new):
        """The Question that `each` was given, or that it makes of a Request. Raises DataError."""
        if isinstance(request, DataError):
            raise request
        if isinstance(request, prompts.Question):
            return request
        sample = prompts.question(request, f"request {number}", self.prepare, new)
        return prompts.Question(prompts.name_of(request, number), sample)

    def stream(self, request: Request, generation: GenerationConfig = GREEDY) -> Iterator[str]:
        """Yields the text of the answer piece by piece.

        A piece never holds part of a character. Joined, the pieces are the text that `generate` gives.

        Raises (when called, before anything is yielded):
          DataError: the request cannot be used.
          ConfigError: `generation` asks for beams or does not fit the vocabulary.
        """
        check(
            generation.num_beams == 1,
            f"streaming needs num_beams=1, not {generation.num_beams}: "
            "which beam wins is known at the end only",
        )
        sizes = self._sizes(generation)
        sample = prompts.question(request, "request", self.prepare, generation.max_new_tokens)
        state = self._start([prompts.Question(prompts.name_of(request, 0), sample)], generation, sizes)
        return streaming.pieces(self.tokenizer, self._tokens(state, generation, sizes))

    def logits(self, requests: Request | Iterable[Request], *, batch_size: int = 4) -> list[np.ndarray]:
        """Logits at every position of a list of Requests, or of a single one, without generating.

        Returns an array float32[T, vocab] for each request. T is the length of the whole laid-out sequence,
        feature rows and special vectors included. The last turn may be the assistant's; otherwise the
        sequence ends where an answer would begin.

        Raises:
          DataError: a request cannot be used.
        """
        samples = {
            i: prompts.lay_out(request, f"request {i}", self.prepare)
            for i, request in enumerate(prompts.as_list(requests))
        }
        found = {}
        for chunk in prompts.chunks(samples, batch_size):
            batch = self._assemble([samples[i] for i in chunk], left=False)
            with self._spread():
                scores = hosts.fetch(forward(self.module, batch))
            for row, i in enumerate(chunk):
                found[i] = scores[row, : len(samples[i].tokens)].copy()  # a view would keep the whole batch
        return [found[i] for i in sorted(found)]

    def _sizes(self, generation):
        """Sizes that the GenerationConfig fits, the same for most of them: each kind is compiled for."""
        vocab = self.config.decoder.vocab
        need = options.needs(generation, self.tokenizer, vocab)
        room = prompts.bucket(generation.max_new_tokens)
        return options.Sizes(vocab, room).join(options.rounded(need))

    def _answers(self, questions, generation, sizes):
        """The Answers to Questions that share a batch."""
        state = self._start(questions, generation, sizes)
        state = self._advance(state, generation.max_new_tokens, sizes)
        found = hosts.fetch(state.search.answers(state.options))
        first = range(0, len(questions) * generation.num_beams, generation.num_beams)
        return [self._answer(generation, *(a[row] for a in found)) for row in first]

    def _start(self, questions, generation, sizes):
        """The state after the first token of each answer."""
        batch = self._assemble([question.sample for question in questions], left=True)
        beams = generation.num_beams
        table = options.blank(len(batch.tokens) * beams, sizes)
        for place, (name, _) in enumerate(questions):
            options.write(table, place * beams, options.options(generation, self.tokenizer, sizes, name))
        with self._spread():
            x = decode.embed(self.module, batch)
            return decode.start(self.module.decoder, x, batch.segments, batch.positions, table, sizes)

    def _advance(self, state, until, sizes):
        with self._spread():
            return decode.advance(self.module.decoder, state, np.int32(until), sizes)

    def _assemble(self, samples, left):
        """The Batch of some Samples, with rows spread over the mesh if there is one."""
        if self.mesh is None:
            return prompts.assemble(samples, self.prepare, left)
        batch = prompts.assemble(samples, self.prepare, left, ways(self.mesh, "batch"))

        def put(a):
            axes = ("batch", *(None,) * (a.ndim - 1))
            return jax.device_put(a, sharding(self.mesh, axes, a.shape))

        return jax.tree.map(put, batch)

    def _spread(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _tokens(self, state, generation, sizes):
        """Yields the token ids of the first row as they are chosen."""
        for step in range(1, generation.max_new_tokens + 1):
            if step > 1:
                state = self._advance(state, step, sizes)
            tokens, done = jax.device_get((state.search.running.tokens, state.search.done))
            yield int(tokens[0, step - 1])
            if done[0]:
                return

    def _answer(self, generation, tokens, logprobs, length, *_):
        tokens = tokens[:length].tolist()
        return Answer(
            self.tokenizer.decode(tokens),
            tokens,
            options.reason(generation, self.tokenizer, tokens),
            float(logprobs[:length].sum()),
        )
