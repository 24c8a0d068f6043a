"""Single instructions through hand-written PTX, against Python models of the documented semantics."""

import math
import struct

import numpy as np
import pytest

import ptxsim

HEADER = ".version 8.4\n.target sm_90\n.address_size 64\n"
TEMPLATE = (
    HEADER
    + """
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)
{{
  .reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .f32 %f<8>; .reg .b64 %rd<16>; .reg .f64 %fd<4>;
  ld.param.u64 %rd0, [pa]; ld.param.u64 %rd1, [pb]; ld.param.u64 %rd2, [pc]; ld.param.u64 %rd3, [pd];
  mov.u32 %r15, %tid.x; mul.wide.u32 %rd4, %r15, {size};
  add.s64 %rd0, %rd0, %rd4; add.s64 %rd1, %rd1, %rd4; add.s64 %rd2, %rd2, %rd4; add.s64 %rd3, %rd3, %rd4;
  ld.global.b{bits} {a}, [%rd0]; ld.global.b{bits} {b}, [%rd1]; ld.global.b{bits} {c}, [%rd2];
  {body}
  st.global.b{bits} [%rd3], {d};
  ret;
}}
"""
)
M32, M64 = 0xFFFFFFFF, (1 << 64) - 1
EDGES = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 0x10000, 0x8001, 255]


def s32(v):
    return (v & M32) - (1 << 32) if v & 0x80000000 else v & M32


def f32(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def run(body, a, b, c, bits=32):
    dtype = {32: np.uint32, 64: np.uint64}[bits]
    regs = {32: ("%r1", "%r2", "%r3", "%r4"), 64: ("%rd5", "%rd6", "%rd7", "%rd8")}[bits]
    text = TEMPLATE.format(bits=bits, size=bits // 8, body=body, **dict(zip("abcd", regs, strict=False)))
    mod = ptxsim.Module(text)
    assert mod.kernels["k"]["unsupported"] == []
    d = np.zeros(len(a), dtype)
    mod.launch("k", 1, len(a), [np.array(v, dtype) for v in (a, b, c)] + [d])
    return [int(v) for v in d]


def bfe_u(a, p, n):
    p, n = p & 255, n & 255
    return 0 if p > 31 else (a >> p) & ((1 << n) - 1) & M32


def bfe_s(a, p, n):
    p, n = p & 255, n & 255
    if n == 0:
        return 0
    sign = a >> min(p + n - 1, 31) & 1
    value = sum(((a >> (p + i) & 1) if p + i < 32 else sign) << i for i in range(min(n, 32)))
    return value | (sign * ((M32 << n) & M32) if n < 32 else 0)


def bfi(a, b, p, n):
    p, n = p & 255, n & 255
    for i in range(n):
        if p + i < 32:
            b = b & ~(1 << (p + i)) | (a >> i & 1) << (p + i)
    return b


def prmt(a, b, sel):
    pool, r = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        s = sel >> (4 * i) & 15
        v = pool[s & 7]
        r |= ((0xFF if v & 0x80 else 0) if s & 8 else v) << (8 * i)
    return r


def carry_chain(a, b, c):
    low = a + b
    return (a + c + (low >> 32)) & M32


TABLE = {
    "add.s32 %r4, %r1, %r2;": lambda a, b, c: a + b,
    "add.sat.s32 %r4, %r1, %r2;": lambda a, b, c: max(min(s32(a) + s32(b), 2**31 - 1), -(2**31)),
    "mad.lo.s32 %r4, %r1, %r2, %r3;": lambda a, b, c: a * b + c,
    "mad.hi.u32 %r4, %r1, %r2, %r3;": lambda a, b, c: (a * b >> 32) + c,
    "mul.hi.s32 %r4, %r1, %r2;": lambda a, b, c: s32(a) * s32(b) >> 32,
    "mul24.lo.s32 %r4, %r1, %r2;": lambda a, b, c: (
        (((a & 0xFFFFFF) ^ 0x800000) - 0x800000) * (((b & 0xFFFFFF) ^ 0x800000) - 0x800000)
    ),
    "sad.s32 %r4, %r1, %r2, %r3;": lambda a, b, c: c + abs(s32(a) - s32(b)),
    "min.s32 %r4, %r1, %r2;": lambda a, b, c: min(s32(a), s32(b)),
    "max.u32 %r4, %r1, %r2;": lambda a, b, c: max(a, b),
    "abs.s32 %r4, %r1;": lambda a, b, c: abs(s32(a)),
    "shl.b32 %r4, %r1, %r2;": lambda a, b, c: 0 if b > 31 else a << b,
    "shr.u32 %r4, %r1, %r2;": lambda a, b, c: 0 if b > 31 else a >> b,
    "shr.s32 %r4, %r1, %r2;": lambda a, b, c: s32(a) >> min(b, 31),
    "shf.l.wrap.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.clamp.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "lop3.b32 %r4, %r1, %r2, %r3, 0xCA;": lambda a, b, c: (a & b) | (~a & c),
    "lop3.b32 %r4, %r1, %r2, %r3, 0x1D;": lambda a, b, c: sum(
        (0x1D >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32)
    ),
    "bfe.u32 %r4, %r1, %r2, %r3;": bfe_u,
    "bfe.s32 %r4, %r1, %r2, %r3;": bfe_s,
    "bfi.b32 %r4, %r1, %r2, %r3, 5;": lambda a, b, c: bfi(a, b, c, 5),
    "prmt.b32 %r4, %r1, %r2, %r3;": prmt,
    "popc.b32 %r4, %r1;": lambda a, b, c: bin(a).count("1"),
    "clz.b32 %r4, %r1;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %r4, %r1;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 %r4, %r1;": lambda a, b, c: a.bit_length() - 1,
    "bfind.s32 %r4, %r1;": lambda a, b, c: (a if s32(a) >= 0 else ~a & M32).bit_length() - 1,
    "bfind.shiftamt.u32 %r4, %r1;": lambda a, b, c: -1 if a == 0 else 32 - a.bit_length(),
    "dp4a.s32.u32 %r4, %r1, %r2, %r3;": lambda a, b, c: (
        c + sum(((x ^ 128) - 128) * y for x, y in zip(a.to_bytes(4, "little"), b.to_bytes(4, "little"), strict=False))
    ),
    "add.cc.u32 %r5, %r1, %r2; addc.u32 %r4, %r1, %r3;": carry_chain,
    "sub.cc.u32 %r5, %r1, %r2; subc.u32 %r4, %r3, %r1;": lambda a, b, c: c - a - (a < b),
    "setp.lt.s32 %p1|%p2, %r1, %r2; selp.b32 %r4, %r3, 7, %p2;": lambda a, b, c: 7 if s32(a) < s32(b) else c,
    "setp.hi.u32 %p1, %r1, %r2; setp.eq.and.s32 %p2, %r3, 0, !%p1; selp.u32 %r4, 1, 0, %p2;": lambda a, b, c: int(
        c == 0 and not a > b
    ),
    "set.ge.u32.s32 %r4, %r1, %r2;": lambda a, b, c: M32 if s32(a) >= s32(b) else 0,
    "slct.s32.s32 %r4, %r1, %r2, %r3;": lambda a, b, c: a if s32(c) >= 0 else b,
    "cvt.sat.s8.s32 %r4, %r1;": lambda a, b, c: max(min(s32(a), 127), -128),
    "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %r1; mov.b32 %r4, {hi, lo}; }": lambda a, b, c: a >> 16 | a << 16,
    "cvt.rzi.s32.f32 %r4, %r1;": lambda a, b, c: 0 if math.isnan(f32(a)) else int(max(min(f32(a), 2147483647), -2147483648)),
    "cvt.rna.tf32.f32 %r4, %r1;": lambda a, b, c: (a + 0x1000 & ~0x1FFF) if a & 0x7F800000 != 0x7F800000 else None,
    "copysign.f32 %r4, %r1, %r2;": lambda a, b, c: a & 0x80000000 | b & 0x7FFFFFFF,
}


@pytest.mark.parametrize("body", list(TABLE))
def test_32_bit(body):
    rng = np.random.default_rng(1)

    def pick():
        return [
            int(v)
            for v in np.where(
                rng.random(256) < 0.4, rng.choice(EDGES, 256), rng.integers(0, 1 << 32, 256) >> rng.integers(0, 32, 256)
            )
        ]

    a, b, c = pick(), pick(), pick()
    if body.startswith("bfe"):
        b, c = [v % 40 for v in b], [v % 40 for v in c]
    if body.startswith("bfi"):
        c = [v % 40 for v in c]
    for x, y, z, got in zip(a, b, c, run(body, a, b, c), strict=False):
        want = TABLE[body](x, y, z)
        assert want is None or got == want & M32, (hex(x), hex(y), hex(z), hex(got), hex(want & M32))


ROUNDED = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b, "sub": lambda a, b: a - b}


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", [*list(ROUNDED), "fma"])
def test_float_rounding(op, mode):
    from fractions import Fraction

    rng = np.random.default_rng(2)
    a, b, c = [(rng.standard_normal(128) * np.exp2(rng.integers(-8, 8, 128))).astype(np.float32) for _ in range(3)]
    body = f"fma.{mode}.f32 %r4, %r1, %r2, %r3;" if op == "fma" else f"{op}.{mode}.f32 %r4, %r1, %r2;"
    got = np.array(run(body, a.view(np.uint32), b.view(np.uint32), c.view(np.uint32)), np.uint32).view(np.float32)
    for x, y, z, g in zip(a, b, c, got, strict=False):
        X, Y, Z = Fraction(float(x)), Fraction(float(y)), Fraction(float(z))
        exact = X * Y + Z if op == "fma" else ROUNDED[op](X, Y)
        lo = hi = np.float32(float(exact))
        while Fraction(float(lo)) > exact:
            lo = np.nextafter(lo, np.float32(-np.inf))
        while Fraction(float(hi)) < exact:
            hi = np.nextafter(hi, np.float32(np.inf))
        if mode == "rn":
            want = min((lo, hi), key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1))  # ties to even
        else:
            want = {"rm": lo, "rp": hi, "rz": lo if exact > 0 else hi}[mode]
        assert g == want


def test_nan_and_zero_rules():
    nan, one = 0x7FC00000, 0x3F800000
    assert run("min.f32 %r4, %r1, %r2;", [nan, one, 0, 0x80000000], [one, nan, 0x80000000, 0], [0] * 4) == [
        one,
        one,
        0x80000000,
        0x80000000,
    ]
    assert run("max.NaN.f32 %r4, %r1, %r2;", [nan, one], [one, 0], [0] * 2) == [0x7FFFFFFF, one]
    assert run("add.ftz.f32 %r4, %r1, %r2;", [0x00000001, 0x80400000], [0, 0x80000000], [0] * 2) == [0, 0x80000000]
    assert run("add.sat.f32 %r4, %r1, %r2;", [one, nan, 0xBF800000], [one, one, 0], [0] * 3) == [one, 0, 0]
    assert run("cvt.rzi.u32.f32 %r4, %r1;", [0xBF800000, nan, 0x4F800000, 0x40200000], [0] * 4, [0] * 4) == [0, 0, M32, 2]


def test_narrow_float_conversions():
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(512) * np.exp2(rng.integers(-26, 17, 512))).astype(np.float32)
    y = np.roll(x, 1)

    def bits(v):
        return v.view(np.uint32)

    got = np.array(run("cvt.rn.f16x2.f32 %r4, %r1, %r2;", bits(x), bits(y), bits(x)), np.uint32)
    with np.errstate(over="ignore"):
        assert np.array_equal(got >> 16, x.astype(np.float16).view(np.uint16)) and np.array_equal(
            got & 0xFFFF, y.astype(np.float16).view(np.uint16)
        )
    got = np.array(run("cvt.rn.bf16x2.f32 %r4, %r1, %r2;", bits(x), bits(y), bits(x)), np.uint32)

    def rounded(v):
        return (bits(v) + 0x7FFF + (bits(v) >> 16 & 1)) >> 16

    assert np.array_equal(got, rounded(x) << 16 | rounded(y))
    torch = pytest.importorskip("torch")
    for name, dtype in (("e4m3x2", torch.float8_e4m3fn), ("e5m2x2", torch.float8_e5m2)):
        top = 448.0 if name == "e4m3x2" else 57344.0
        got = run(f"{{ .reg .b16 q; cvt.rn.satfinite.{name}.f32 q, %r1, %r2; cvt.u32.u16 %r4, q; }}", bits(x), bits(y), bits(x))
        want = torch.from_numpy(np.clip(x, -top, top)).to(dtype).view(torch.uint8).numpy().astype(np.uint32)
        low = torch.from_numpy(np.clip(y, -top, top)).to(dtype).view(torch.uint8).numpy().astype(np.uint32)
        assert np.array_equal(np.array(got, np.uint32), want << 8 | low)


def test_64_bit():
    a, b, c = [3, M64, 1 << 63, 12345678901234567], [5, 2, 3, 98765432109], [1, 64, 63, 7]
    assert run("mul.hi.u64 %rd8, %rd5, %rd6;", a, b, c, 64) == [x * y >> 64 for x, y in zip(a, b, strict=False)]
    assert run("mad.lo.u64 %rd8, %rd5, %rd6, %rd7;", a, b, c, 64) == [x * y + z & M64 for x, y, z in zip(a, b, c, strict=False)]
    assert run("div.u64 %rd8, %rd5, %rd6;", a, b, c, 64) == [x // y for x, y in zip(a, b, strict=False)]
    assert run("cvt.u32.u64 %r9, %rd7; shr.s64 %rd8, %rd5, %r9;", a, b, c, 64) == [
        ((x - (1 << 64) if x >> 63 else x) >> min(z, 63)) & M64 for x, z in zip(a, c, strict=False)
    ]


def test_branch_table_predicated_calls_and_scoped_labels():
    text = (
        HEADER
        + """
.func (.param .b32 out) triple (.param .b32 in) {
  .reg .b32 %r<4>;
  ld.param.b32 %r1, [in]; mad.lo.s32 %r2, %r1, 2, %r1; st.param.b32 [out], %r2; ret; }
.visible .entry k(.param .u64 pd)
{
  .reg .pred %p<3>; .reg .b32 %r<9>; .reg .b64 %rd<4>;
  ld.param.u64 %rd0, [pd]; mov.u32 %r0, %tid.x; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd0, %rd1;
  and.b32 %r1, %r0, 3; mov.u32 %r5, 0;
  ts: .branchtargets L0, L1, L2, L2;
  brx.idx %r1, ts;
L0: mov.u32 %r5, 100; bra DONE;
L1: { .param .b32 p; .param .b32 q; st.param.b32 [p], %r0; call (q), triple, (p); ld.param.b32 %r5, [q]; }
  bra DONE;
L2: { LOOP: add.s32 %r5, %r5, 1; setp.lt.s32 %p1, %r5, %r0; @%p1 bra LOOP; }
DONE: bar.warp.sync 0xffffffff;
  { LOOP: add.s32 %r5, %r5, 1; and.b32 %r6, %r5, 3; setp.ne.s32 %p1, %r6, 0; @%p1 bra LOOP; }
  st.global.b32 [%rd2], %r5; ret;
}
"""
    )
    d = np.zeros(32, np.uint32)
    ptxsim.Module(text).launch("k", 1, 32, [d])

    def up(v):
        return (v // 4 + 1) * 4

    assert list(d) == [up(100 if t % 4 == 0 else 3 * t if t % 4 == 1 else t) for t in range(32)]


def test_unsupported_instruction_is_fatal_only_when_executed():
    text = (
        HEADER
        + """
.visible .entry k(.param .u64 pd, .param .u32 n) { .reg .pred %p<2>; .reg .b32 %r<3>; .reg .b64 %rd<3>;
  ld.param.u64 %rd0, [pd]; ld.param.u32 %r0, [n]; setp.eq.s32 %p0, %r0, 0; @%p0 bra SKIP;
  wgmma.fence.sync.aligned;
SKIP: st.global.u32 [%rd0], 5; ret; }
"""
    )
    mod, d = ptxsim.Module(text), np.zeros(1, np.uint32)
    assert len(mod.kernels["k"]["unsupported"]) == 1 and "wgmma.fence" in mod.kernels["k"]["unsupported"][0]
    mod.launch("k", 1, 1, [d, 0])
    assert d[0] == 5
    with pytest.raises(ptxsim.SimulationError, match=r"unsupported instruction wgmma\.fence"):
        mod.launch("k", 1, 1, [d, 1])


def test_extra_memory_and_poison():
    text = (
        HEADER
        + """
.visible .entry k(.param .u64 pp, .param .u64 pd) { .reg .b32 %r<3>; .reg .f32 %f<2>; .reg .b64 %rd<4>;
  ld.param.u64 %rd0, [pp]; ld.param.u64 %rd1, [pd]; ld.global.u64 %rd2, [%rd0]; ld.global.u32 %r0, [%rd2];
  st.global.u32 [%rd1], %r0; st.global.f32 [%rd1+4], %f1; ret; }
"""
    )
    hidden, d = np.array([77], np.uint32), np.zeros(2, np.uint32)
    pointers = np.array([hidden.ctypes.data], np.uint64)
    mod = ptxsim.Module(text)
    with pytest.raises(ptxsim.SimulationError, match="out of bounds"):
        mod.launch("k", 1, 1, [pointers, d])
    mod.launch("k", 1, 1, [pointers, d], extra_memory=[hidden], poison_registers=True)
    assert d[0] == 77 and np.isnan(d.view(np.float32)[1])


def test_syntax_errors_name_the_line():
    with pytest.raises(ptxsim.SimulationError, match="PTX line 5"):
        ptxsim.Module(HEADER + "\n.visible .entry k() { @%nope bra L; }")
