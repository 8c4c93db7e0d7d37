"""A Gluon kernel with two roles for the launcher's tests: one warp loads, the others store."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# Renamed after triton 3.6.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _load(x_desc, smem, full, empty, boxes):
    for box in range(boxes):
        mbarrier.wait(empty, box & 1 ^ 1)
        mbarrier.expect(full, x_desc.block_type.nbytes)
        load_box(x_desc, [box * x_desc.block_type.shape[0], 0], full, smem)


@gluon.jit
def _double(y_desc, smem, result, full, empty, boxes, WAITS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for box in range(boxes):
        if WAITS:
            mbarrier.wait(full, box & 1)
        x = smem.load(layout)
        mbarrier.arrive(empty)
        tma.store_wait(0)
        result.store(x + x)
        fence_async_shared()
        store_box(y_desc, [box * y_desc.block_type.shape[0], 0], result)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["boxes"])
def double_boxes(x_desc, y_desc, boxes, WAITS: gl.constexpr = True):
    """y = 2 x, both (rows, columns) described by boxes of whole rows; wrong if it does not wait."""
    smem = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    result = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_type.shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_double, (y_desc, smem, result, full, empty, boxes, WAITS)),
            (_load, (x_desc, smem, full, empty, boxes)),
        ],
        [1],
        [24],
    )
