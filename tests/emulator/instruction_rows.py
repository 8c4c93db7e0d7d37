"""The rows of the instruction table: what to run, on which type, and what it must give."""

import numpy as np

from .instruction_table import (
    F64,
    LANES,
    bf16,
    bf16_pairs,
    bit_field_insert,
    f16_pairs,
    flush,
    greatest,
    integers,
    join,
    least,
    permute,
    rounded,
    row,
    same_lanes,
    shift_right,
    single,
    to_bf16,
    to_f16_bits,
    to_int,
)

LANE = np.arange(LANES)
INTEGER_ROWS = [
    *(
        row(f"{op}.{kind}", kind, integers(f))
        for kind in ("s16", "u16", "s32", "u32", "s64", "u64")
        for op, f in (
            ("add", lambda a, b: a + b),
            ("sub", lambda a, b: a - b),
            ("min", lambda a, b: min(a, b)),
            ("max", lambda a, b: max(a, b)),
            ("mul.lo", lambda a, b: a * b),
            ("mad.lo", lambda a, b, c: a * b + c),
        )
    ),
    row("mul.hi.s32", "s32", integers(lambda a, b: a * b >> 32)),
    row("mul.hi.u32", "u32", integers(lambda a, b: a * b >> 32)),
    row("mul.hi.u64", "u64", integers(lambda a, b: a * b >> 64)),
    row("mul.wide.s32", "s32", integers(lambda a, b: a * b), "s64"),
    row("mul.wide.u16", "u16", integers(lambda a, b: a * b), "u32"),
    row("mad.wide.u32", "u32", integers(lambda a, b: a * b + 9), "u64", "{d}, {a}, {b}, 9"),
    row("add.sat.s32", "s32", integers(lambda a, b: max(-(2**31), min(2**31 - 1, a + b)))),
    row("div.s32", "s32", integers(lambda a: int(a / 7)), operands="{d}, {a}, 7"),
    row("rem.s32", "s32", integers(lambda a: a - 7 * int(a / 7)), operands="{d}, {a}, 7"),
    row("div.u32", "u32", integers(lambda a: a // 7), operands="{d}, {a}, 7"),
    row("rem.u64", "u64", integers(lambda a: a % 7), operands="{d}, {a}, 7"),
    row("abs.s32", "s32", integers(lambda a: abs(a))),
    row("neg.s64", "s64", integers(lambda a: -a)),
    row("and.b32", "b32", integers(lambda a, b: a & b)),
    row("or.b64", "b64", integers(lambda a, b: a | b)),
    row("xor.b16", "b16", integers(lambda a, b: a ^ b)),
    row("not.b32", "b32", integers(lambda a: ~a)),
    row("cnot.b32", "b32", integers(lambda a: a == 0)),
    row("shl.b32", "b32", integers(lambda a, b: a << b if b < 32 else 0)),
    row("shr.u32", "u32", integers(shift_right)),
    row("shr.s32", "s32", integers(lambda a: a >> 40), operands="{d}, {a}, 40"),
    row(
        "shf.l.wrap.b32",
        "u32",
        integers(lambda a, b: (b << 32 | a) << 7 >> 32),
        operands="{d}, {a}, {b}, 39",
    ),
    row("shf.r.clamp.b32", "u32", integers(lambda a, b: b), operands="{d}, {a}, {b}, 39"),
    row(
        "lop3.b32", "b32", integers(lambda a, b, c: a & b ^ c), operands="{d}, {a}, {b}, {c}, 0x6a"
    ),
    row("prmt.b32", "b32", integers(permute)),
    row("bfe.u32", "u32", integers(lambda a: a >> 5 & 0x7F), operands="{d}, {a}, 5, 7"),
    row(
        "bfe.s32",
        "s32",
        integers(lambda a: (a >> 5 & 0x7F ^ 0x40) - 0x40),
        operands="{d}, {a}, 5, 7",
    ),
    row("bfi.b32", "b32", integers(bit_field_insert), operands="{d}, {a}, {b}, 7, 5"),
    row("popc.b32", "b32", integers(lambda a: bin(a).count("1"))),
    row("popc.b64", "b64", integers(lambda a: bin(a).count("1")), "u32"),
    row("clz.b32", "b32", integers(lambda a: 32 - a.bit_length())),
    row("clz.b64", "b64", integers(lambda a: 64 - a.bit_length()), "u32"),
    row("brev.b32", "b32", integers(lambda a: int(f"{a:032b}"[::-1], 2))),
    row("bfind.u32", "u32", integers(lambda a: a.bit_length() - 1)),
    row(
        "bfind.shiftamt.s32",
        "s32",
        integers(lambda a: 32 - (~a if a < 0 else a).bit_length() if a not in (0, -1) else -1),
        "u32",
    ),
]

FLOAT_ROWS = [
    *(
        row(f"{op}.{kind}", kind, f)
        for kind in ("f32", "f64")
        for op, f in (
            ("add.rn", lambda a, b: a + b),
            ("sub.rn", lambda a, b: a - b),
            ("mul.rn", lambda a, b: a * b),
            ("div.rn", lambda a, b: a / b),
        )
    ),
    *(
        row(f"{op}.r{mode}.f32", "f32", rounded(f, mode, op == "add"))
        for mode in "zmp"
        for op, f in (("add", lambda a, b: a + b), ("mul", lambda a, b: a * b))
    ),
    row("fma.rn.f32", "f32", lambda a, b, c: single(a.astype(np.longdouble) * b + c), ulps=1),
    row("add.ftz.f32", "f32", lambda a, b: flush(flush(a) + flush(b))),
    row("mul.ftz.f32", "f32", lambda a, b: flush(flush(a) * flush(b))),
    row("add.sat.f32", "f32", lambda a, b: np.nan_to_num(np.clip(a + b, 0, 1), nan=0)),
    row("min.f32", "f32", lambda a, b: least(a, b)),
    row("max.f32", "f32", lambda a, b: greatest(a, b)),
    row("max.NaN.f32", "f32", lambda a, b: greatest(a, b, np.maximum)),
    row("abs.f32", "f32", lambda a: np.abs(a)),
    row("neg.f64", "f64", lambda a: -a),
    row("copysign.f32", "f32", lambda a, b: np.copysign(b, a)),
    row("sqrt.rn.f32", "f32", lambda a: np.sqrt(a)),
    row("rcp.rn.f32", "f32", lambda a: np.float32(1) / a),
    row("rsqrt.approx.f32", "f32", lambda a: single(1 / np.sqrt(a.astype(F64))), ulps=3),
    row("ex2.approx.f32", "f32", lambda a: single(np.exp2(a.astype(F64))), ulps=3),
    row("lg2.approx.f32", "f32", lambda a: single(np.log2(a.astype(F64))), ulps=3),
    row(
        "ex2.approx.ftz.f32", "f32", lambda a: flush(single(np.exp2(flush(a).astype(F64)))), ulps=3
    ),
    *(
        row(f"{op}.f16", "f16", f)
        for op, f in (
            ("add", lambda a, b: a + b),
            ("sub", lambda a, b: a - b),
            ("mul", lambda a, b: a * b),
            ("neg", lambda a: -a),
            ("abs", lambda a: np.abs(a)),
        )
    ),
    row("fma.rn.f16", "f16", lambda a, b, c: (a.astype(np.longdouble) * b + c).astype(np.float16)),
    row(
        "fma.rn.bf16",
        "bf16",
        lambda a, b, c: to_bf16(bf16(a).astype(F64) * bf16(b) + bf16(c)),
        ulps=1,
    ),
    row("add.f16x2", "f16x2", f16_pairs(lambda a, b: a + b)),
    row("mul.f16x2", "f16x2", f16_pairs(lambda a, b: a * b)),
    row("fma.rn.f16x2", "f16x2", f16_pairs(lambda a, b, c: a * b + c)),
    row("max.f16x2", "f16x2", f16_pairs(lambda a, b: greatest(a, b))),
    row("min.bf16x2", "bf16x2", bf16_pairs(lambda a, b: least(a, b))),
    row("fma.rn.bf16x2", "bf16x2", bf16_pairs(lambda a, b, c: a * b + c)),
]

COMPARISON_ROWS = [
    *(
        row(f"setp.{op}.f32", "f32", f, "pred")
        for op, f in (
            ("lt", lambda a, b: a < b),
            ("ge", lambda a, b: a >= b),
            ("ne", lambda a, b: (a != b) & (a == a) & (b == b)),
            ("ltu", lambda a, b: ~(a >= b)),
            ("neu", lambda a, b: a != b),
            ("nan", lambda a, b: (a != a) | (b != b)),
            ("num", lambda a, b: (a == a) & (b == b)),
        )
    ),
    row("setp.lt.s32", "s32", lambda a, b: a < b, "pred"),
    row("setp.lo.u32", "u32", lambda a, b: a < b, "pred"),
    row("setp.eq.u64", "u64", lambda a, b: a == b, "pred"),
    row("setp.gt.f16", "f16", lambda a, b: a > b, "pred"),
    row("setp.le.bf16", "bf16", lambda a, b: bf16(a) <= bf16(b), "pred"),
    row("set.lt.u32.f32", "f32", lambda a, b: np.where(a < b, 2**32 - 1, 0), "u32"),
    row("set.lt.f32.s32", "s32", lambda a, b: (a < b).astype(np.float32), "f32"),
    row("testp.infinite.f32", "f32", lambda a: np.isinf(a), "pred"),
    row(
        "testp.subnormal.f32",
        "f32",
        lambda a: (a != 0) & (np.abs(a) < np.finfo(np.float32).tiny),
        "pred",
    ),
    row(
        "slct.s32.f32",
        "s32",
        lambda a, b: np.where(LANE >= 0, a, b),
        operands="{d}, {a}, {b}, 0f3f800000",
    ),
]

I32 = (-(2**31), 2**31 - 1)
CONVERSION_ROWS = [
    row("cvt.rn.f32.s32", "s32", lambda a: a.astype(np.float32), "f32"),
    row("cvt.rn.f32.u64", "u64", lambda a: a.astype(np.float32), "f32"),
    row("cvt.rn.f64.s64", "s64", lambda a: a.astype(F64), "f64"),
    row("cvt.rn.f16.s32", "s32", lambda a: a.astype(F64).astype(np.float16), "f16"),
    row("cvt.rzi.s32.f32", "f32", to_int(*I32, np.trunc), "s32"),
    row("cvt.rni.s32.f32", "f32", to_int(*I32, np.rint), "s32"),
    row("cvt.rmi.s32.f64", "f64", to_int(*I32, np.floor), "s32"),
    row("cvt.rpi.u32.f32", "f32", to_int(0, 2**32 - 1, np.ceil), "u32"),
    row("cvt.rzi.u8.f32", "f32", to_int(0, 255, np.trunc), "u16"),
    row("cvt.sat.s8.s32", "s32", integers(lambda a: max(-128, min(127, a))), "s16"),
    row("cvt.sat.u16.s32", "s32", integers(lambda a: max(0, min(65535, a))), "u16"),
    row("cvt.u8.u32", "u32", integers(lambda a: a & 255), "u16"),
    row("cvt.s64.s32", "s32", integers(lambda a: a), "s64"),
    row("cvt.u64.u32", "u32", integers(lambda a: a), "u64"),
    row("cvt.rn.f16.f32", "f32", lambda a: a.astype(np.float16), "f16"),
    row("cvt.f32.f16", "f16", lambda a: a.astype(np.float32), "f32"),
    row("cvt.rn.bf16.f32", "f32", lambda a: to_bf16(a), "bf16"),
    row(
        "cvt.rz.bf16.f32",
        "f32",
        lambda a: np.where(np.isnan(a), 0x7FFF, a.view(np.uint32) >> 16),
        "bf16",
    ),
    row("cvt.f32.bf16", "bf16", lambda a: bf16(a), "f32"),
    row("cvt.rn.bf16x2.f32", "f32", lambda a, b: join(to_bf16(b), to_bf16(a)), "bf16x2"),
    row(
        "cvt.rn.relu.bf16x2.f32",
        "f32",
        lambda a, b: join(*(to_bf16(np.where(x <= 0, 0, x)) for x in (b, a))),
        "bf16x2",
    ),
    row("cvt.rn.f16x2.f32", "f32", lambda a, b: join(to_f16_bits(b), to_f16_bits(a)), "f16x2"),
    row(
        "cvt.sat.f32.f32",
        "f32",
        lambda a: np.nan_to_num(np.clip(a, 0, 1), nan=0) + np.float32(0),
        "f32",
    ),
    row("cvt.ftz.f32.f32", "f32", lambda a: flush(a), "f32"),
    row("cvt.rni.f32.f32", "f32", lambda a: np.rint(a), "f32"),
    row("cvt.rmi.f32.f32", "f32", lambda a: np.floor(a), "f32"),
    row("cvt.rz.f32.f64", "f64", lambda a: rounded(lambda x: x, "z")(a), "f32"),
]

WARP_ROWS = [
    row("shfl.sync.bfly.b32", "b32", lambda a: a[LANE ^ 5], operands="{d}, {a}, 5, 31, -1"),
    row(
        "shfl.sync.up.b32",
        "b32",
        lambda a: a[np.where(LANE < 3, LANE, LANE - 3)],
        operands="{d}, {a}, 3, 0, -1",
    ),
    row(
        "shfl.sync.down.b32",
        "b32",
        lambda a: a[np.where(LANE % 16 < 12, LANE + 4, LANE)],
        operands="{d}, {a}, 4, 0x100f, -1",
    ),
    row(
        "shfl.sync.idx.b32",
        "b32",
        lambda a: a[LANE // 8 * 8 + 2],
        operands="{d}, {a}, 2, 0x1807, -1",
    ),
    row(
        "redux.sync.add.s32",
        "s32",
        lambda a: np.full(LANES, a.sum(dtype=np.int32)),
        operands="{d}, {a}, -1",
    ),
    row("redux.sync.max.u32", "u32", lambda a: np.full(LANES, a.max()), operands="{d}, {a}, -1"),
    row(
        "redux.sync.xor.b32",
        "b32",
        lambda a: np.full(LANES, np.bitwise_xor.reduce(a)),
        operands="{d}, {a}, -1",
    ),
    row("match.any.sync.b32", "b32", lambda a: same_lanes(a), operands="{d}, {a}, -1"),
]

ROWS = [*INTEGER_ROWS, *FLOAT_ROWS, *COMPARISON_ROWS, *CONVERSION_ROWS, *WARP_ROWS]
