import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mimic_video.analysis.hlo import Collective, Program

STEP = """
HloModule step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (p0: f32[28,64,64], p1: s32[]) -> f32[64,64] {
  %p0 = f32[28,64,64]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,64,64]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %block = f32[64,64]{1,0:T(8,128)} bitcast(%slice)
}

%body (state: (s32[], f32[28,64,64], f32[16,64])) -> (s32[], f32[28,64,64], f32[16,64]) {
  %state = (s32[]{:T(128)}, f32[28,64,64]{2,1,0:T(8,128)}, f32[16,64]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %stack = f32[28,64,64]{2,1,0:T(8,128)} get-tuple-element(%state), index=1
  %x = f32[16,64]{1,0:T(8,128)} get-tuple-element(%state), index=2
  %w = f32[64,64]{1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %gathered = f32[64,256]{1,0:T(8,128)S(1)} all-gather(%w), channel_id=1, replica_groups=[1,4]<=[4], dimensions={1}
  %y = f32[16,64]{1,0:T(8,128)S(1)} convolution(%x, %w), dim_labels=bf_io->bf
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(2)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, f32[28,64,64]{2,1,0:T(8,128)}, f32[16,64]{1,0:T(8,128)}) tuple(%next, %stack, %y)
}

%until (state.1: (s32[], f32[28,64,64], f32[16,64])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[28,64,64]{2,1,0:T(8,128)}, f32[16,64]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(28)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (stack.1: f32[28,64,64], x.1: f32[16,64]) -> f32[16,64] {
  %stack.1 = f32[28,64,64]{2,1,0:T(8,128)} parameter(0)
  %x.1 = f32[16,64]{1,0:T(8,128)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %first = (s32[]{:T(128)}, f32[28,64,64]{2,1,0:T(8,128)}, f32[16,64]{1,0:T(8,128)}) tuple(%start, %stack.1, %x.1)
  %loop = (s32[]{:T(128)}, f32[28,64,64]{2,1,0:T(8,128)}, f32[16,64]{1,0:T(8,128)}) while(%first), condition=%until, body=%body
  %last = f32[16,64]{1,0:T(8,128)} get-tuple-element(%loop), index=2
  ROOT %total = f32[16,64]{1,0:T(8,128)} all-reduce(%last), channel_id=2, replica_groups={{0,2},{1,3}}, to_apply=%add
}
"""
BLOCK, ROWS = 64 * 64 * 4, 16 * 64 * 4  # bytes of a block's weights and of x


def test_loops_count_as_often_as_they_run():
    work = Program(STEP).work()
    assert work.unknown_loops == 0
    assert work.flops == 28 * 2 * 16 * 64 * 64
    assert work.collectives == (
        Collective("all-gather", "ici", 28, 28 * 3 * BLOCK),  # a chip sends its part to three others
        Collective("all-reduce", "ici", 1, 2 * ROWS / 2),  # of two chips each sends half, twice
    )


def test_iterations_that_xla_has_joined_count_together():
    """As in products that are spread over a ring of chips."""
    assert Program(STEP.replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)")).work().flops == (
        14 * 2 * 16 * 64 * 64
    )
    added = "%next = s32[]{:T(128)S(2)} add(%i, %one)"
    copied = STEP.replace(added, "%sum.1 = s32[] add(%i, %one)\n  %next = s32[]{:T(128)S(2)} copy(%sum.1)")
    assert copied != STEP and Program(copied).work().unknown_loops == 0
    assert Program(STEP.replace("add(%i, %one)", "multiply(%i, %one)")).work().unknown_loops == 1


def test_traffic_is_of_main_memory_and_of_slices_where_only_they_are_read():
    counters = 3 * 4
    assert Program(STEP).work().hbm_bytes == 28 * (BLOCK + ROWS + counters) + 2 * ROWS  # what is in S(1) and S(2) is on the chip


def test_between_slices_the_runtime_reduces():
    send = (
        "(f32[16,64]{1,0:T(8,128)}, u32[], token[]) send(%last, %token), channel_id=4, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = STEP.replace("  ROOT %total", f"  %token = token[] after-all()\n  %sent = {send}\n  ROOT %total")
    assert Collective("all-reduce", "dcn", 1, 2 * ROWS * 3 / 4) in Program(text).work(slices=4).collectives


def test_reductions_that_keep_a_part_are_scattered():
    whole = "%total = f32[16,64]{1,0:T(8,128)} all-reduce(%last), channel_id=2, replica_groups={{0,2},{1,3}}, to_apply=%add"
    text = STEP.replace(whole, "%total = f32[8,64]{1,0} fusion(%last), kind=kCustom, calls=%all-reduce-scatter.1")
    scatter = """
%all-reduce-scatter.1 (p: f32[16,64]) -> f32[8,64] {
  %p = f32[16,64]{1,0} parameter(0)
  %reduced = f32[16,64]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %part = f32[8,64]{1,0} slice(%reduced), slice={[0:8], [0:64]}
}
"""
    assert Collective("reduce-scatter", "ici", 1, ROWS / 2) in Program(scatter + text).work().collectives


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[1,4]<=[4]", 4),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 4),
    ],
)
def test_groups_of_devices(groups, size):
    reduced = Program(STEP.replace("replica_groups={{0,2},{1,3}}", groups)).work().collectives[1]
    assert reduced.bytes == 2 * ROWS * (size - 1) / size


def test_a_permutation_sends_all_it_has():
    text = STEP.replace("all-reduce(%last)", "collective-permute(%last)").replace("replica_groups={{", "source_target_pairs={{")
    assert Program(text).work().collectives[1] == Collective("collective-permute", "ici", 1, ROWS)


def test_loops_of_unknown_length_are_said_to_be():
    text = STEP.replace("constant(28)", "parameter(1)")
    work = Program(text).work()
    assert work.unknown_loops == 1 and work.flops == 2 * 16 * 64 * 64


def test_parts_of_one_collective_count_once():
    """TPUs gather in several fusions between parts of a product, all with the same channel and chain."""
    part = 'all-gather(%w), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}'
    line = "  %gathered = f32[64,256]{1,0:T(8,128)S(1)} all-gather(%w), channel_id=1, replica_groups=[1,4]<=[4], dimensions={1}"
    shape = "f32[64,256]{1,0:T(8,128)S(1)}"
    text = STEP.replace(line, f"  %gathered = {shape} {part}\n  %gathered.1 = {shape} {part}")
    assert text != STEP
    gather = Program(text).work().collectives[0]
    assert (gather.kind, gather.count) == ("all-gather", 28)


def test_batched_products_of_tpus_count_what_is_not_padding():
    """A product of 8 pairs of matrices is a convolution over dilated input, of which one tap in 8 meets a value."""
    window = "window={size=8 stride=7 lhs_dilate=8}"
    text = f"""
ENTRY %main (x: f32[8,16,32], w: f32[8,32,64]) -> f32[8,16,64] {{
  %x = f32[8,16,32]{{2,1,0}} parameter(0)
  %w = f32[8,32,64]{{2,1,0}} parameter(1)
  ROOT %y = f32[8,16,64]{{2,1,0}} convolution(%x, %w), {window}, dim_labels=0bf_0io->0bf
}}"""
    assert Program(text).work().flops == 8 * 2 * 16 * 32 * 64


def test_what_xla_compiled_is_read():
    """A sharded scan on the simulated devices: weights gathered in every step, a mean over the batch at the end."""
    mesh = jax.make_mesh((8,), ("fsdp",))

    def loss(weights, x):
        return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])

    weights, x = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, spec in (((5, 32, 32), (None, "fsdp")), ((16, 32), ("fsdp",)))
    )
    work = Program(jax.jit(loss).lower(weights, x).compile().as_text()).work()
    assert work.unknown_loops == 0
    assert work.flops == 5 * 2 * 2 * 32 * 32  # two rows a device
    gathered = next(each for each in work.collectives if each.kind == "all-gather")
    assert gathered.bytes == 5 * 7 * 32 * 32 * 4 / 8  # a device sends its eighth of the weights to seven others
