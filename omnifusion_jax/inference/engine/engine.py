"""The engine: requests go in from any thread, answers come out."""

import contextlib
import threading

from omnifusion_jax.config import GenerationConfig, check, one_of
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.inference import forms, prompts
from omnifusion_jax.inference.answer import Answer
from omnifusion_jax.inference.engine.handle import Handle, Progress
from omnifusion_jax.inference.engine.scheduler import Scheduler
from omnifusion_jax.inference.engine.sizes import CHUNKS
from omnifusion_jax.inference.engine.task import Task
from omnifusion_jax.inference.engine.warmup import warm_up
from omnifusion_jax.inference.options import Sizes, needs, rounded, rows_of

GREEDY = GenerationConfig()
BURST = 16  # tokens that are chosen between two turns of the thread: so long do newcomers wait
WHOLE = 2**30  # all tokens of an answer


class Engine:
    """Answers requests in slots that they leave to others as soon as they are done.

    Requests enter and leave between two tokens, and each has its own GenerationConfig. Who waits for an
    answer drives the engine; after `start`, or as a context, a thread of its own does:

        with of.Engine(model, slots=16, length=2048) as engine:
            handles = [engine.submit(request) for request in requests]
            answers = [handle.result() for handle in handles]

    An answer does not depend on its neighbours, but for rounding: the same request may be read in other
    pieces, or partly be found in the cache.
    """

    def __init__(
        self,
        model,
        slots: int | tuple[int, ...] = 16,
        length: int | tuple[int, ...] = 2048,
        largest: GenerationConfig = GREEDY,
        chunks: tuple[int, ...] = CHUNKS,
        cache: str = "model",
    ):
        """Makes the engine of an `inference.model.Model`.

        Args:
          slots: requests that are answered together, where each draw of several counts as one; or numbers
            from small to large, of which as many are made as are asked for.
          length: positions of a slot, question and answer together; or several from small to large, of which
            the longest request decides.
          largest: asks for as much as there is room for from the beginning: tokens, beams, banned sequences.
            A request that asks for more waits until nobody else is there, and has programs compiled.
          chunks: lengths of the pieces in which prompts are read, from small to large.
          cache: the dtype of keys and values, "model" for that of the model, or "int8": 8 bits, with a scale
            for each position of each head.

        Raises: ConfigError for another `cache`.
        """
        several = lambda n: (n,) if isinstance(n, int) else tuple(n)
        self.model, self.prepare, self.tokenizer = model, model.prepare, model.tokenizer
        self.vocab = model.config.decoder.vocab
        one_of("cache", cache, ("model", "int8"))
        self.scheduler = Scheduler(
            model,
            self.sizes(largest),
            several(slots),
            several(length),
            chunks,
            WHOLE,
            None if cache == "model" else cache,
        )
        self.warm = False  # nothing is compiled any more, and what would need it is refused
        self.inbox, self.changed = [], threading.Condition()  # the inbox is touched with `changed` held alone
        self.turning = threading.Lock()  # held by who drives the engine
        self.thread = None

    @property
    def attention(self) -> str:
        """A line that says which kernels of attention choose tokens so far, and why not others."""
        return self.scheduler.device.attention.line()

    def submit(
        self,
        request: Request | prompts.Question | DataError,
        generation: GenerationConfig = GREEDY,
        *,
        number: int = 0,
        where: str = "request",
    ) -> Handle:
        """Takes a request; what is wrong with it becomes its Answer.

        Args:
          request: may be laid out already, or be the error that laying it out gave.
          number: what random draws depend on beside the seed, of a request that has no id.
          where: what error messages begin with.
        """
        try:
            if isinstance(request, DataError):
                raise request
            if not isinstance(request, prompts.Question):
                sample = prompts.question(request, where, self.prepare, generation.max_new_tokens)
                request = prompts.Question(prompts.name_of(request, number), sample)
            return self.put(request, generation, where)
        except (DataError, ConfigError) as error:
            return Handle(Progress(answer=Answer(finish_reason="error", error=str(error))), self)

    def put(self, question: prompts.Question, generation: GenerationConfig, where: str) -> Handle:
        """Takes a request that is laid out.

        Raises:
          ConfigError: `generation` does not fit the vocabulary, or needs more than the engine has.
          DataError: slots are too short for it.
        """
        name, sample = question
        task = Task(sample, generation, self.sizes(generation), name, where, self.prepare.tiles)
        task.guides = forms.guides(generation, self.tokenizer, self.vocab, rows_of(generation))
        scheduler = self.scheduler
        slots, length = scheduler.counts[-1], scheduler.lengths[-1]
        check(
            task.count <= slots,
            f"num_return_sequences is {task.count}, but the engine has {slots} slots. Give it more",
        )
        if task.length > length:
            raise DataError(
                f"{where}: {len(sample.tokens)} tokens and max_new_tokens {generation.max_new_tokens} exceed "
                f"the engine's {length}. Shorten the dialogue or the answer, or give the engine more length",
                "too_long",
            )
        if self.warm:
            scheduler.must_fit(task)
        with self.changed:
            self.inbox.append(task)
            self.changed.notify_all()
        return Handle(task.progress, self)

    def sizes(self, generation: GenerationConfig) -> Sizes:
        """The capacities that a GenerationConfig needs, the same for most. Raises ConfigError as `needs`."""
        need = rounded(needs(generation, self.tokenizer, self.vocab))
        return need.join(Sizes(vocab=self.vocab, room=prompts.bucket(generation.max_new_tokens)))

    def warmup(self):
        """Compiles all that may be needed. From then on requests that need more are refused."""
        with self.turning:
            assert not self.scheduler.tasks, "requests are being answered"
            warm_up(self.scheduler)
        self.warm = True
        return self

    def work(self, until):
        """Drives the engine, or waits for its thread, until the function `until` gives True."""
        while not until():
            if self.thread is not None:
                with self.changed:
                    self.changed.wait_for(lambda: until() or self.thread is None)
            else:
                with self.turning:
                    if not until():
                        self.turn()

    def run(self):
        """Drives the engine until everybody is answered."""
        self.work(lambda: not (self.inbox or self.scheduler.tasks))

    def turn(self):
        with self.changed:
            self.scheduler.waiting += self.inbox
            self.inbox.clear()
        try:
            self.scheduler.turn()
        except BaseException as error:
            # What was on the device may be lost half way.
            for task in self.scheduler.tasks:
                task.fail(f"the engine was interrupted: {error!r}. Ask again")
            self.scheduler.waiting.clear()
            self.scheduler.reset()
            raise
        finally:
            self.wake()

    def wake(self):
        with self.changed:
            self.changed.notify_all()

    def start(self):
        """Starts the thread that drives the engine."""
        assert self.thread is None, "the engine has its thread already"
        self.scheduler.burst = BURST
        self.thread = threading.Thread(target=self.serve, daemon=True, name="omnifusion engine")
        self.thread.start()
        return self

    def serve(self):
        """What the thread does."""
        me = threading.current_thread()
        while self.thread is me:
            with self.changed:
                self.changed.wait_for(lambda: self.inbox or self.scheduler.tasks or self.thread is not me)
            if self.thread is me:
                with self.turning, contextlib.suppress(Exception):  # it is told in the answers
                    self.turn()

    def close(self):
        """Ends the thread; answers that are not finished become errors."""
        thread, self.thread = self.thread, None
        self.wake()
        if thread is not None:
            thread.join()
        with self.turning:
            for task in [*self.inbox, *self.scheduler.tasks]:
                task.fail("the engine was closed before the answer was finished")
            self.inbox.clear()
            self.scheduler.waiting.clear()
            self.scheduler.reset()
        self.wake()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.close()
