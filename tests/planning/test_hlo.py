"""What devices exchange, read from compiled programs whose exchanges are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from omnifusion_jax import sharding
from omnifusion_jax.planning import hlo

WIDTH, LAYERS = 64, 5


def compiled(program, *shapes):
    """The exchanges of a program on eight devices; shapes come with their specs."""
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    given = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, spec in shapes
    ]
    with jax.set_mesh(mesh):
        return hlo.collectives(jax.jit(program).lower(*given).compile().as_text())


def test_a_loop_exchanges_as_often_as_it_runs():
    """The weight of each layer, spread over four devices, is gathered; each device has rows of its own."""

    def layers(x, weights):
        def layer(x, w):
            x = sharding.constrain(x, "batch", None)
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0]

    (found,) = compiled(layers, ((8, WIDTH), ("fsdp", None)), ((LAYERS, WIDTH, WIDTH), (None, "fsdp", None)))
    assert (found.kind, found.times, found.devices) == ("all-gather", LAYERS, 4)
    assert found.received == 3 * WIDTH // 4 * WIDTH * 4
    assert found.type in (f"f32[{WIDTH // 4},{WIDTH}]", f"f32[1,{WIDTH // 4},{WIDTH}]")


@pytest.mark.parametrize(("spec", "devices"), [(("fsdp",), 4), (("tensor",), 2), ((("fsdp", "tensor"),), 8)])
def test_a_sum_over_devices(spec, devices):
    (found,) = compiled(lambda x: x.sum(axis=0), ((8, WIDTH), spec))
    assert (found.kind, found.times, found.devices, found.type) == ("all-reduce", 1, devices, f"f32[{WIDTH}]")
    assert found.received == 2 * (devices - 1) / devices * WIDTH * 4


def test_one_device_exchanges_nothing():
    text = jax.jit(lambda x: x @ x).lower(jnp.zeros((4, 4))).compile().as_text()
    assert hlo.collectives(text) == []


TEXT = """HloModule step, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %r = bf16[2,16]{1,0} reduce-scatter(%x), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
  %g = (bf16[2,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%r), channel_id=7, replica_groups={{0,1,2,3}}
  %h = bf16[8,16]{1,0} all-gather-done(%g)
  %later = bf16[8,16]{1,0} all-gather(%r), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %h)
}

%outer (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %q = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %w = (s32[], bf16[8,16]{1,0}) while(%q), condition=%c, body=%inner, backend_config={TRIPS:{"n":"3"}}
}

%c (p: (s32[], bf16[8,16])) -> pred[] {
  ROOT %always = pred[] constant(true)
}

%place (o: u8[64], w: s8[10]) -> u8[64] {
  ROOT %placed = u8[64]{0} dynamic-update-slice(%o, %w, %there)
}

%half (w: u8[64]) -> u8[32] {
  %w = u8[64]{0} parameter(0)
  ROOT %cut = u8[32]{0} slice(%w), slice={[0:32]}
}

%all-reduce-scatter.1 (z: f32[8,16]) -> f32[2,16] {
  %z = f32[8,16]{1,0} parameter(0)
  %whole = f32[8,16]{1,0} all-reduce(%z), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %mine = f32[2,16]{1,0} dynamic-slice(%whole, %here, %zero), dynamic_slice_sizes={2,16}
}

ENTRY %main (x: s8[10], y: f32[3,3]) -> f32[] {
  %x = s8[10]{0} parameter(0)
  %y = f32[3,3]{1,0} parameter(1)
  %p = s8[10]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %alone = u8[64]{0} dynamic-update-slice(%zeros, %x, %here)
  %fused = u8[64]{0} fusion(%zeros, %x), kind=kLoop, calls=%place
  %moved = (u8[64]{0}, u8[64]{0:S(1)}, u32[]) copy-start(%alone)
  %there = u8[64]{0:S(1)} copy-done(%moved)
  %first = ((u8[64]{0}), u8[32]{0:S(1)}, s32[]) async-start(%there), calls=%half
  %ended = u8[32]{0:S(1)} async-done(%first)
  %joined = u8[64]{0} custom-call(%ended, %ended), custom_call_target="ConcatBitcast"
  %gathered = u8[64]{0} all-reduce(%joined, %fused), replica_groups={}, to_apply=%add
  %cut = f32[2,16]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
  %near = f32[3,3]{1,0} copy(%y)
  %both = (u8[64]{0}, f32[3,3]{1,0}) all-reduce(%alone, %near), replica_groups={}, to_apply=%add
  ROOT %w = (s32[], bf16[8,16]{1,0}) while(%z), condition=%c, body=%outer, backend_config={TRIPS:{"n":"5"}}
}
""".replace("TRIPS", '"known_trip_count"')


def test_every_kind_in_loops_within_loops():
    found = {one.kind: one for one in hlo.collectives(TEXT) if one.type not in ("f32[8,16]", "u8[64] u8[64]")}
    assert {kind: (one.times, one.devices, one.received) for kind, one in found.items()} == {
        "collective-permute": (1, 4, 10),
        "all-reduce": (1, 4, 1.5 * (64 + 36)),  # one of both is a piece, the other a sum
        "reduce-scatter": (15, 4, 0.75 * 256),
        "all-gather": (15, 4, 3 * 64),
    }
    assert found["reduce-scatter"].type == "bf16[8,16]"


def test_a_sum_of_which_a_device_keeps_its_part_is_no_sum_on_all():
    """The compiler for TPUs writes it as an all-reduce in a computation of this name."""
    (found,) = [one for one in hlo.collectives(TEXT) if one.type == "f32[8,16]"]
    assert (found.kind, found.times, found.received) == ("reduce-scatter", 1, 0.75 * 8 * 16 * 4)


def test_a_sum_of_pieces_in_zeros_is_no_sum():
    """Nor is it where the compiler moves one of them to another memory first, in parts."""
    (found,) = [one for one in hlo.collectives(TEXT) if one.type == "u8[64] u8[64]"]
    assert (found.kind, found.received) == ("all-gather by sum", 1.5 * 128)


@pytest.mark.parametrize(
    ("type", "size"),
    [("pred[3]", 3), ("s4[8]", 4), ("f8e4m3fn[2,2]", 4), ("f32[]", 4), ("(bf16[2], u32[2])", 12)],
)
def test_sizes(type, size):
    assert hlo.size_of(type) == size


@pytest.mark.parametrize(
    ("attributes", "devices"),
    [
        ("replica_groups=[2,16]<=[32]", 16),
        ("replica_groups={{0,1,2},{3,4,5}}, dimensions={0}", 3),
        ("replica_groups=mesh['data'=2,'fsdp'=16]{'fsdp'}", 16),
        ("replica_groups=mesh['data'=2,'fsdp'=16]{'data','fsdp'}", 32),
        ("replica_groups=mesh['data'=2,'fsdp'=16]{'fsdp':(2)4}", 4),  # a part of an axis
        ("channel_id=1", 8),  # all
    ],
)
def test_how_many_take_part(attributes, devices):
    assert hlo.devices(attributes, "HloModule step, num_partitions=8") == devices
