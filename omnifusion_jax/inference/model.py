"""A model with a tokenizer, ready to answer requests."""

import collections
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from omnifusion_jax import hosts
from omnifusion_jax.config import GenerationConfig, ModelConfig, check, one_of
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference import forms, options, prompts, scoring
from omnifusion_jax.inference.answer import Answer
from omnifusion_jax.inference.engine import Engine
from omnifusion_jax.inference.engine.scheduler import BROKEN
from omnifusion_jax.inference.engine.sizes import doubled, lengths
from omnifusion_jax.models.answering import answering
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.quantized import KINDS
from omnifusion_jax.sharding import mesh_of, sharding, ways

GREEDY = GenerationConfig()


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
        self.talks = None  # the Engine of streams, made when one is asked for

    def __repr__(self):
        count = sum(a.size for a in nnx.parameters(abstract(self.config)).values())
        arrays, kept = list(nnx.parameters(self.module).values()), collections.Counter()
        for a in arrays:
            kept[KINDS.get(a.dtype, a.dtype.name)] += a.nbytes
        kinds, size = ", ".join(kind for kind, _ in kept.most_common()), kept.total() / 1e6
        first, *others = arrays[0].devices()
        name, where = f"Model {self.name}".rstrip(), f"{1 + len(others)} x {first.device_kind}"
        return f"<{name}: {count:,} parameters, {kinds}, {size:,.1f} MB, on {where}>"

    def generate(
        self,
        requests: Request | Iterable[Request],
        generation: GenerationConfig = GREEDY,
        *,
        batch_size: int = 16,
        on_error: str = "raise",
    ) -> list[Answer]:
        """Answers a list of Requests, or a single one. Returns a list of Answers in the same order.

        At most `batch_size` requests are answered at a time; an answer does not depend on the others, but for
        rounding. All pictures are in memory at once (340 kB each at 336 pixels): give very long lists in
        portions. Random draws depend on `generation.seed` and the id of the request, or on its place in the
        list if it has no id.

        Raises:
          DataError: a request cannot be used, or the model's scores are not numbers; the message counts
            requests from 0 (`request 3`). With `on_error="record"` the error is kept in the request's Answer,
            and the others are answered.
          ConfigError: `generation` does not fit the vocabulary, or `on_error` is unknown; or it asks for a
            form that cannot be met, which "record" keeps in every Answer.
        """
        one_of("on_error", on_error, ("raise", "record"))
        self._check(generation, form=on_error == "raise")
        answers, samples = {}, {}
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
        # The longest come first: they decide how long rows are.
        order = sorted(samples, key=lambda i: -len(samples[i].tokens))
        asked = ((i, prompts.Question(prompts.name_of(requests[i], i), samples.pop(i))) for i in order)
        for i, answer in self._answers(asked, generation, batch_size):
            if answer.error is not None and on_error == "raise":
                raise DataError(answer.error)
            answers[i] = answer
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
          ConfigError: `generation` does not fit the vocabulary, or asks for a form that cannot be met.
        """
        self._check(generation)
        return self._answers(enumerate(requests), generation, batch_size)

    def _check(self, generation, form=True):
        """Raises ConfigError if `generation` does not fit the vocabulary, or its `form` cannot be met."""
        asked = generation, self.tokenizer, self.config.decoder.vocab
        options.needs(*asked)
        if form:
            forms.guides(*asked, 1)

    def _answers(self, numbered, generation, batch_size):
        """Yields (number, Answer) of numbered requests, which are what `each` takes."""
        each, asked, more = options.slots_of(generation), {}, True
        engine = Engine(
            self,
            slots=doubled(each, each * batch_size),
            length=lengths(self.config.decoder.max_length),
            largest=generation,
        )
        while more or asked:
            while more and len(asked) < batch_size:
                number, request = next(numbered, (None, None))
                more = number is not None
                engine.scheduler.more = more
                if more:
                    asked[number] = engine.submit(
                        request, generation, number=number, where=f"request {number}"
                    )
            engine.work(lambda: not asked or any(handle.done for handle in asked.values()))
            for number in [number for number, handle in asked.items() if handle.done]:
                yield number, asked.pop(number).result()

    def stream(self, request: Request, generation: GenerationConfig = GREEDY) -> Iterator[str]:
        """Yields the text of the answer piece by piece.

        A piece never holds part of a character. Joined, the pieces are the text that `generate` gives. What
        the last dialogues had in common with this one, a picture or earlier turns, is not read again.

        Raises (when called, before anything is yielded):
          DataError: the request cannot be used.
          ConfigError: `generation` asks for beams or for a form that cannot be met, or does not fit the
            vocabulary.
        """
        check(
            options.rows_of(generation) == 1,
            f"streaming needs num_beams=1 and num_return_sequences=1, not {generation.num_beams} and "
            f"{generation.num_return_sequences}: which answer is the first is known at the end only",
        )
        self._check(generation)
        sample = prompts.question(request, "request", self.prepare, generation.max_new_tokens)
        return self._pieces(prompts.Question(prompts.name_of(request, 0), sample), generation)

    def _pieces(self, question, generation):
        if self.talks is None:
            self.talks = Engine(self, slots=doubled(1, 16), length=lengths(self.config.decoder.max_length))
        handle = self.talks.put(question, generation, "request")
        try:
            yield from handle.pieces()
            if (error := handle.result().error) is not None:
                raise DataError(error)
        finally:
            handle.cancel()

    def engine(self, **settings) -> Engine:
        """An Engine that answers with this model; `settings` are those of `Engine`."""
        return Engine(self, **settings)

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
            batch = self._assemble([samples[i] for i in chunk])
            with self._spread():
                scores = hosts.fetch(forward(self.module, batch))
            for row, i in enumerate(chunk):
                found[i] = scores[row, : len(samples[i].tokens)].copy()  # a view would keep the whole batch
        return [found[i] for i in sorted(found)]

    def score(
        self, request: Request, candidates: Sequence[str], *, batch_size: int = 16
    ) -> list[scoring.Score]:
        """How likely each of some given answers to a Request is. Returns a list of Scores in the same order.

        An answer's tokens are those that training would learn from it, the end of the sequence included.
        Pictures and prompt are read once; the answers follow, `batch_size` at a time.

        Raises:
          DataError: the request cannot be used, or an answer is empty or too long for it; or the model's
            scores are not numbers.
        """
        question, answered = scoring.lay_out(request, candidates, "request", self.prepare)
        if not answered:
            return []
        rest, batch, found = scoring.Rest(question, answered), self._assemble([question]), []
        at = np.int32(rest.start)
        rows = min(batch_size, len(answered))
        with self._spread():
            cache, first = scoring.read(self.module, batch, at, rest.size)
            for begin in range(0, len(answered), rows):
                # the last ones have others beside them, so that all have one shape
                here = np.minimum(np.arange(begin, begin + rows), len(answered) - 1)
                scored = scoring.follow(
                    self.module.decoder, cache, first, at, rest.tokens[here], rest.targets[here]
                )
                found += list(hosts.fetch(scored))
        scores = [rest.score(row, logprobs) for row, logprobs in enumerate(found[: len(answered)])]
        if not np.isfinite([score.logprob for score in scores]).all():
            raise DataError(f"request: {BROKEN.format(dtype=self.dtype)}")
        return scores

    def _assemble(self, samples):
        """The Batch of some Samples, with rows spread over the mesh if there is one."""
        if self.mesh is None:
            return prompts.assemble(samples, self.prepare)
        batch = prompts.assemble(samples, self.prepare, ways(self.mesh, "batch"))

        def put(a):
            axes = ("batch", *(None,) * (a.ndim - 1))
            return jax.device_put(a, sharding(self.mesh, axes, a.shape))

        return jax.tree.map(put, batch)

    def _spread(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
