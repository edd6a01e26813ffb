"""What is read of the compiler's list of buffers, as libtpu 0.0.42 writes it."""

import time

import pytest

from omnifusion_jax.planning import early

BUFFERS = """BufferAssignment:
allocation 0: size 4096, parameter 1, shape |bf16[16,128]| at ShapeIndex {}:
 value: <1 x @0> (size=4096,offset=0): bf16[16,128]{1,0}
allocation 1: size 8192, parameter 0, shape |f32[16,128]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 512, output shape is |(f32[16,128], f32[])|, maybe-live-out:
allocation 3: size 256, constant:
allocation 4: size 512, thread-local:
allocation 5: size 100000, preallocated-temp:
allocation 6: size 7000, color 1, preallocated-temp:
"""


def test_bytes_by_kind():
    """Colours are other memories than the large one; arguments that results take the place of count once."""
    assert early.sizes(BUFFERS) == (12288, 8704, 100000, 4096 + 8192 + 512 + 256 + 100000)


class Lowered:
    """A program whose compiler writes its files, and then generates code for as long as it is let."""

    def __init__(self, folder, number, error=None):
        self.folder, self.number, self.error = folder, number, error

    def compile(self):
        if self.error:
            raise self.error
        for name, text in (
            (early.TEXT, f"program {self.number}"),
            (early.BUFFERS, BUFFERS),
            (early.LAST, ""),
        ):
            (self.folder / f"module_{self.number}.step.{name}").write_text(text)
        time.sleep(0.5)


def test_what_is_decided_is_there_before_the_program(tmp_path):
    for number in (0, 1):
        found = early.decided(Lowered(tmp_path, number), tmp_path)
        assert found.text == f"program {number}" and found.total == 113056


def test_what_the_compiler_refuses_is_raised(tmp_path):
    with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"):
        early.decided(Lowered(tmp_path, 0, ValueError("RESOURCE_EXHAUSTED")), tmp_path)
