"""Attention forward for Hopper (sm_90) in Gluon: csrc/attention.h says what is computed.

Three roles in one block: a warp that loads by TMA, and two warpgroups that each have 64 of the
block's 128 queries. They meet at mbarriers alone, so that one warpgroup's exponentials run beside
the other's products, and the loads of a block's next tile beside the end of its last one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Renamed after triton 3.6.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

ROWS = gl.constexpr(64)  # of a warpgroup: what one wgmma multiplies
CONSUMERS = gl.constexpr(2)
BLOCK_M = gl.constexpr(128)
RUNTIME = ["queries", "keys", "pairs", "heads", "group", "together", "left", "right"]


@gluon.jit
def _place(turn):
    """Of this block among all of them in a round of tiles, of which every second one runs
    backwards: what is longer in one round is shorter in the next.
    """
    last = gl.num_programs(0) - 1
    return gl.where(turn % 2 == 0, gl.program_id(0), last - gl.program_id(0))


@gluon.jit
def _turns(sizes):
    """How many tiles are this block's."""
    queries, _, pairs, _, _, _, _, _ = sizes
    tiles, blocks = gl.cdiv(queries, BLOCK_M) * pairs, gl.num_programs(0)
    whole = tiles // blocks
    return gl.where(_place(whole) < tiles - whole * blocks, whole + 1, whole)


@gluon.jit
def _tile_at(turn, sizes):
    """(first query, pair of batch and head) of a tile. `together` pairs, whose keys and values fit
    in the L2 cache, are gone through before the next ones; among them the longest rows of a causal
    mask come first, so that what is left for the end is short.
    """
    queries, _, pairs, _, _, together, _, _ = sizes
    row_tiles = gl.cdiv(queries, BLOCK_M)
    index = turn * gl.num_programs(0) + _place(turn)
    section = index // (row_tiles * together)
    within = index - section * row_tiles * together
    width = gl.minimum(together, pairs - section * together)
    return (row_tiles - 1 - within // width) * BLOCK_M, section * together + within % width


@gluon.jit
def _keys_of(first_query, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, sizes):
    """(first key, number of tiles of keys) that ROWS queries see. At least one tile, which may be
    masked out altogether: the loops need no case for nothing.
    """
    queries, keys, _, _, _, _, left, right = sizes
    position = first_query + keys - queries
    start = gl.maximum(position - left, 0) // BLOCK_N * BLOCK_N
    end = gl.minimum(keys, position + ROWS + right)
    return start, gl.maximum(gl.cdiv(end - start, BLOCK_N), 1)


@gluon.jit
def _produce(q_desc, k_desc, v_desc, smem, bars, sizes, BLOCK_N: gl.constexpr):
    """The loading warp: q, and keys and values tile by tile, each as soon as its place is free."""
    q_smem, k_smem, v_smem, _ = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    Q_STAGES: gl.constexpr = q_full.shape[0]
    STAGES: gl.constexpr = k_full.shape[0]
    _, _, _, heads, group, _, _, _ = sizes
    step = 0  # tiles of keys so far
    for turn in range(_turns(sizes)):
        first_query, pair = _tile_at(turn, sizes)
        batch, head = pair // heads, pair % heads
        kv_head = head // group
        start, count = _keys_of(first_query, BLOCK_M, BLOCK_N, sizes)
        slot = turn % Q_STAGES
        mbarrier.wait(q_empty.index(slot), turn // Q_STAGES & 1 ^ 1)
        mbarrier.expect(q_full.index(slot), CONSUMERS * q_desc.block_type.nbytes)
        for who in gl.static_range(CONSUMERS):
            place = q_smem.index(slot * CONSUMERS + who)
            load_box(q_desc, [batch, first_query + who * ROWS, head, 0], q_full.index(slot), place)
        for tile in range(count):
            row, slot, parity = start + tile * BLOCK_N, step % STAGES, step // STAGES & 1 ^ 1
            mbarrier.wait(k_empty.index(slot), parity)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            load_box(k_desc, [batch, row, kv_head, 0], k_full.index(slot), k_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), parity)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            load_box(v_desc, [batch, row, kv_head, 0], v_full.index(slot), v_smem.index(slot))
            step += 1


@gluon.jit
def _softmax(s, highest, total, scale, headroom, first_query, first_key, sizes):
    """(p, highest, total, fade) after a tile of scores: online softmax, in base 2.

    Most tiles need no mask, and most others one side of it: a comparison of each column, which is
    a constant, with its row's end.
    """
    queries, keys, _, _, _, _, left, right = sizes
    BLOCK_N: gl.constexpr = s.shape[1]
    position = first_query + keys - queries - first_key
    row = gl.arange(0, ROWS, gl.SliceLayout(1, s.type.layout))
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout))[None, :]
    end = keys - first_key
    if gl.minimum(end, position + right + 1) < BLOCK_N:
        ends = gl.minimum(end, row + (position + right + 1))
        s = gl.where(column < ends[:, None], s, -float("inf"))
    if position - left + ROWS - 1 > 0:
        s = gl.where(column >= (row + (position - left))[:, None], s, -float("inf"))
    higher = gl.maximum(highest, gl.max(s, 1) * scale)
    seen = gl.where(higher == -float("inf"), 0.0, higher)  # -inf - -inf is not 0
    p = gl.exp2(s * scale - (seen + headroom)[:, None])
    fade = gl.exp2(highest - seen)
    return p, higher, total * fade + gl.sum(p, 1), fade


@gluon.jit
def _scores(q, k_smem, k_full, step, STAGES: gl.constexpr, s_layout: gl.constexpr):
    """q k^T of a tile of keys, begun."""
    slot = step % STAGES
    mbarrier.wait(k_full.index(slot), step // STAGES & 1)
    BLOCK_N: gl.constexpr = k_smem.shape[2]
    k = k_smem.index(slot).reshape([BLOCK_N, k_smem.shape[4]]).permute((1, 0))
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def _add_values(p, v_smem, v_full, step, STAGES: gl.constexpr, o):
    """o + p v of a tile of values, begun."""
    slot = step % STAGES
    mbarrier.wait(v_full.index(slot), step // STAGES & 1)
    v = v_smem.index(slot).reshape([v_smem.shape[2], v_smem.shape[4]])
    return warpgroup_mma(p, v, o, is_async=True)


@gluon.jit
def _attend(
    q, smem, bars, step, count, shared_count, first_query, start, scale, headroom, sizes
):  # fmt: skip
    """(o, highest, total, step) of 64 queries over `count` tiles of keys; `shared_count` are those
    that are loaded for the whole block. The scores of a tile are begun before the values of the
    tile before it, and its exponentials run beside them.
    """
    _, k_smem, v_smem, _ = smem
    _, _, k_full, k_empty, v_full, v_empty = bars
    STAGES: gl.constexpr = k_full.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[2]
    BLOCK_D: gl.constexpr = k_smem.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    highest = gl.full([ROWS], -float("inf"), gl.float32, s_rows)
    total = gl.zeros([ROWS], gl.float32, s_rows)
    o = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)

    s = warpgroup_mma_wait(0, deps=[_scores(q, k_smem, k_full, step, STAGES, s_layout)])
    mbarrier.arrive(k_empty.index(step % STAGES))
    p, highest, total, _ = _softmax(s, highest, total, scale, headroom, first_query, start, sizes)
    p_operand = gl.convert_layout(p.to(k_smem.dtype), p_layout)
    for tile in range(1, count):
        s = _scores(q, k_smem, k_full, step + 1, STAGES, s_layout)
        o = _add_values(p_operand, v_smem, v_full, step, STAGES, o)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index((step + 1) % STAGES))
        first_key = start + tile * BLOCK_N
        p, highest, total, fade = _softmax(
            s, highest, total, scale, headroom, first_query, first_key, sizes
        )
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(v_empty.index(step % STAGES))
        o = o * gl.convert_layout(fade, o_rows)[:, None]
        p_operand = gl.convert_layout(p.to(k_smem.dtype), p_layout)
        step += 1
    o = warpgroup_mma_wait(0, deps=[_add_values(p_operand, v_smem, v_full, step, STAGES, o)])
    mbarrier.arrive(v_empty.index(step % STAGES))
    step += 1
    # Tiles that only the other warpgroup reads: given back when they have come, and not before,
    # or this warpgroup would count twice for what lay there before.
    for _ in range(count, shared_count):
        slot, parity = step % STAGES, step // STAGES & 1
        mbarrier.wait(k_full.index(slot), parity)
        mbarrier.arrive(k_empty.index(slot))
        mbarrier.wait(v_full.index(slot), parity)
        mbarrier.arrive(v_empty.index(slot))
        step += 1
    return o, gl.convert_layout(highest, o_rows), gl.convert_layout(total, o_rows), step


@gluon.jit
def _consume(
    o_desc, lse_ptr, smem, bars, scale, headroom, sizes, WHO: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """A warpgroup: its 64 queries of each of the block's tiles."""
    q_smem, k_smem, _, o_smem = smem
    q_full, q_empty, _, _, _, _ = bars
    Q_STAGES: gl.constexpr = q_full.shape[0]
    BLOCK_D: gl.constexpr = k_smem.shape[4]
    queries, _, _, heads, _, _, _, _ = sizes
    o_place = o_smem.index(WHO)
    step = 0
    for turn in range(_turns(sizes)):
        first_query, pair = _tile_at(turn, sizes)
        start, shared_count = _keys_of(first_query, BLOCK_M, BLOCK_N, sizes)
        first_query += WHO * ROWS
        own_start, own_count = _keys_of(first_query, ROWS, BLOCK_N, sizes)
        count = gl.minimum((own_start - start) // BLOCK_N + own_count, shared_count)
        slot = turn % Q_STAGES
        mbarrier.wait(q_full.index(slot), turn // Q_STAGES & 1)
        q = q_smem.index(slot * CONSUMERS + WHO).reshape([ROWS, BLOCK_D])
        o, highest, total, step = _attend(
            q, smem, bars, step, count, shared_count, first_query, start, scale, headroom, sizes
        )
        mbarrier.arrive(q_empty.index(slot))
        o = o * gl.where(total > 0, 1.0 / total, 0.0)[:, None]
        tma.store_wait(0)  # the tile before this one has left o_place
        o_place.reshape([ROWS, BLOCK_D]).store(o.to(q_smem.dtype))
        fence_async_shared()
        store_box(o_desc, [pair // heads, first_query, pair % heads, 0], o_place)
        row = first_query + gl.arange(0, ROWS, highest.type.layout)
        lse = (highest + headroom + gl.log2(total)) * 0.6931471805599453
        lse_at = lse_ptr + gl.cast(pair, gl.int64) * queries + row
        gl.store(lse_at, lse.to(gl.float64), mask=row < queries)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUNTIME)
def attention_hopper_forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, scale, headroom, queries, keys, pairs, heads, group,
    together, left, right, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """o = softmax(scale * q k^T) v and lse, by online softmax; scale comes times log2(e).
    Exponentials are smaller by `headroom`, in base 2, than relative to the highest score.

    Blocks go through the tiles of 128 queries of one head that are theirs (_tile_at). Reads each
    tile's q once, and the keys and values that it sees BLOCK_N at a time; writes o and lse (pairs,
    queries) once. The descriptors are of (batch, sequence, heads, head_dim): rows past the end of a
    sequence, and columns past the head, are zero on loading and left out on storing.
    """
    sizes = (queries, keys, pairs, heads, group, together, left, right)
    dtype: gl.constexpr = q_desc.dtype
    BLOCK_D: gl.constexpr = q_desc.block_type.shape[3]
    smem = (
        gl.allocate_shared_memory(
            dtype, [Q_STAGES * CONSUMERS, 1, ROWS, 1, BLOCK_D], q_desc.layout
        ),
        gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, BLOCK_D], k_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, BLOCK_D], v_desc.layout),
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, ROWS, 1, BLOCK_D], o_desc.layout),
    )
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    for slot in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=CONSUMERS)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=CONSUMERS)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=CONSUMERS)
    fence_async_shared()
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (
                _consume,
                (o_desc, lse_ptr, smem, bars, scale, headroom, sizes, gl.constexpr(0), BLOCK_N),
            ),
            (
                _consume,
                (o_desc, lse_ptr, smem, bars, scale, headroom, sizes, gl.constexpr(1), BLOCK_N),
            ),
            (_produce, (q_desc, k_desc, v_desc, smem, bars, sizes, BLOCK_N)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, 24],
    )
