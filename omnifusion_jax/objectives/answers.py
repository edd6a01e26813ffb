"""The objective "answers": a model learns the answers in dialogues about media."""

import functools
import math

from omnifusion_jax import hosts
from omnifusion_jax.config import TrainConfig, check
from omnifusion_jax.data.check import start_check
from omnifusion_jax.data.describe import describe
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.pipeline import Batches
from omnifusion_jax.data.reading import open_reading
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.errors import DataError
from omnifusion_jax.evaluation.exact_match import exact_match
from omnifusion_jax.evaluation.held_out import check_held_out
from omnifusion_jax.evaluation.held_out_loss import HeldOutLoss
from omnifusion_jax.inference.model import Model
from omnifusion_jax.models.omnifusion import OmniFusion
from omnifusion_jax.nn import nnx
from omnifusion_jax.sharding import make_mesh, owners, shares, ways
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training.loss import answer_loss


class Answers:
    """See objectives.base.Objective."""

    rows, text, module = 1, True, OmniFusion
    pairs, columns = False, ()

    def of(self, config):
        return self

    def begin(self, config, tokenizer, arrays):
        pass

    def loss(self, module, batch, key, remat):
        return answer_loss(module.decoder, module.hidden(batch, key, remat), batch, remat=remat)

    def ignorance(self, config, tokenizer):
        """ln of the vocabulary: all tokens are equally likely."""
        return math.log(tokenizer.vocab)

    def expectation(self, config, tokenizer) -> str:
        """What loss to expect, in a sentence."""
        ignorance = self.ignorance(config, tokenizer)
        return f"The loss of a model that knows nothing is ln {tokenizer.vocab} = {ignorance:.1f}."

    def reading(self, config, tokenizer):
        """The Reading of a run."""
        return open_reading(config.data, config.model, tokenizer)

    def read_by(self, config, data):
        """(source, prepare) of the batches, from the Reading of a run."""
        return data.source, data.prepare

    def batches(self, config, tokenizer):
        c, data = config.data, self.reading(config, tokenizer)
        print(describe(data.source, data.prepare, tokenizer))
        print(self.expectation(config, tokenizer))
        check = None
        if c.check == "first_epoch" and hosts.first():
            long = c.on_long == "skip"
            check = functools.partial(start_check, data.source, data.prepare, c.num_workers, long)
        return Batches(
            *self.read_by(config, data),
            shares=data.shares,
            choose=data.choose,
            length=data.length,
            tiles=data.prepare.tiles,
            usual=data.usual,
            on_bad_sample=c.on_bad_sample,
            on_long=c.on_long,
            bad_share=c.bad_share,
            check=check,
            **common(config),
        )

    def evaluator(self, config, tokenizer):
        c, figure = config.eval, config.checkpoint.keep_best
        found = {"accuracy": c.answers, "blind_accuracy": c.answers and c.blind, "loss": c.loss}
        check(
            not figure or (c.path and found.get(figure)),
            f"checkpoint.keep_best is {figure!r}, and eval gives no such figure: set eval.path, "
            "and eval.answers for accuracy, eval.blind besides for blind_accuracy, eval.loss for loss",
        )
        if not c.path:
            return None
        try:
            source = open_source(c.path, c.images, config.model.image.encoders[0].side)
        except DataError as error:
            raise error.at("eval.path") from error
        ask = Prepare.of(tokenizer, config.model, config.model.decoder.max_length)
        learn = Prepare.of(
            tokenizer,
            config.model,
            config.data.max_length,
            cut=config.data.on_long == "cut",
            max_pixels=config.data.max_pixels,
            draft=config.data.draft,
        )
        check_held_out(source, c, ask, learn)
        check(self.rows == 1 or not c.loss, "eval.loss takes objectives that make one row of a dialogue")
        held_out_loss = HeldOutLoss(
            self.loss,
            nnx.eval_shape(lambda: self.module(config.model, rngs=nnx.Rngs(0))),
            source,
            learn,
            count=c.count,
            length=config.data.max_length,
            rows=config.batch_size // config.grad_accum,
            dtype=config.compute_dtype,
        )

        def evaluate(arrays):
            figures, records = {}, []
            if c.loss:
                figures["loss"] = held_out_loss(arrays)
            if c.answers:
                model = Model(config.model, arrays, tokenizer, dtype=config.compute_dtype)
                asked, records = exact_match(
                    model,
                    source,
                    c.count,
                    batch_size=c.batch_size,
                    max_new_tokens=c.max_new_tokens,
                    blind=c.blind,
                )
                figures |= asked
            return figures, records

        return evaluate


def common(config: TrainConfig) -> dict:
    """The arguments of `Batches` that are the same for every objective."""
    mesh = make_mesh(**vars(config.mesh))
    rows = shares(mesh, config.batch_size)
    apart = owners(rows)

    def gather(thing):  # of hosts with the same rows only one counts
        found = hosts.gather(thing, "data")
        return [found[i] for i in apart] if found else found

    return {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "shuffle": config.data.shuffle,
        "num_workers": config.data.num_workers,
        "pools": config.grad_accum * ways(mesh, "batch"),  # one for each micro-batch and device
        "numbers": rows[hosts.number()],
        "gather": gather,
    }


OBJECTIVES["answers"] = Answers()
