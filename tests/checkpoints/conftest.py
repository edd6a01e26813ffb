"""A tiny model in files laid out like the published OmniFusion release."""

import shutil

import pytest
import tiny
import transformers

C = tiny.config(layout="original")
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An original directory in bfloat16, and the PyTorch model in it."""
    torch = pytest.importorskip("torch")
    from parity import torch_models

    directory = tmp_path_factory.mktemp("original")
    theirs = torch_models.Original(C, tiny.make_tokenizer(directory / "tokenizer"))
    for module in (theirs.clip, theirs.adapter, theirs.llm):
        module.to(torch.bfloat16)
    theirs.llm.save_pretrained(directory / "tuned-model")
    theirs.clip.save_pretrained(directory / "my-clip")
    theirs.adapter.train()
    torch.save(theirs.adapter, directory / "projection.pt")
    theirs.special = {
        name: t.detach().to(torch.bfloat16).requires_grad_() for name, t in theirs.special.items()
    }
    torch.save(theirs.special, directory / "special_embeddings.pt")
    return directory, theirs


@pytest.fixture
def source(built, tmp_path):
    shutil.copytree(built[0], tmp_path / "source")
    return tmp_path / "source"
