"""Triton kernels compiled ahead of time for sm_80 (and one for sm_90), against torch."""

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

import ptxsim  # noqa: E402

ALIGNED = [["tt.divisibility", 16]]


def build(fn, signature, constexprs, aligned=(), **options):
    names = list(signature)
    attrs = {(names.index(n),): ALIGNED for n in aligned}
    full = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    order = {n: full[n] for n in fn.arg_names}
    attrs = {(fn.arg_names.index(n),): ALIGNED for n in aligned}
    kernel = ptxsim.compile_triton(fn, order, constexprs, attrs=attrs, **options)
    assert kernel.unsupported == []
    return kernel


@triton.jit
def add_kernel(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@pytest.mark.parametrize("seed", [0, 3])
def test_masked_add(seed):
    n = 1000
    x, y, o = torch.randn(n), torch.randn(n), torch.zeros(n)
    k = build(add_kernel, {"x": "*fp32", "y": "*fp32", "o": "*fp32", "n": "i32"}, {"B": 128}, aligned="xyo")
    stats = k(8, x, y, o, n, seed=seed)
    assert torch.equal(o, x + y)
    assert stats["global"]["load"]["efficiency"] == 1.0
    by_region = {entry["region"].split()[1]: entry for entry in stats["regions"]}
    assert {key: (entry["class"].split()[0], entry["bytes"]) for key, entry in by_region.items()} == {
        "0": ("load", 4 * n),
        "1": ("load", 4 * n),
        "2": ("store", 4 * n),
    }
    assert sum(entry["sectors"] for entry in by_region.values()) == 3 * n // 8


@triton.jit
def softmax_kernel(x, o, n, stride, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    v = tl.load(x + r * stride + i, mask=i < n, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(o + r * stride + i, e / tl.sum(e, 0), mask=i < n)


def test_softmax():
    x = torch.randn(5, 300)
    o = torch.zeros_like(x)
    build(softmax_kernel, {"x": "*fp32", "o": "*fp32", "n": "i32", "stride": "i32"}, {"B": 512})(5, x, o, 300, 300)
    assert torch.allclose(o, x.softmax(1), rtol=1e-5, atol=1e-7)


@triton.jit
def matmul_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        av = tl.load(a + rm[:, None] * K + rk[None, :], mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0)
        bv = tl.load(b + rk[:, None] * N + rn[None, :], mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(av, bv, acc, input_precision=PREC)
    tl.store(c + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


def run_matmul(dtype, name, precision, M, N, K, tol, **options):
    torch.manual_seed(0)
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.zeros(M, N)
    k = build(
        matmul_kernel,
        {"a": f"*{name}", "b": f"*{name}", "c": "*fp32", "M": "i32", "N": "i32", "K": "i32"},
        {"BM": 64, "BN": 64, "BK": 32, "PREC": precision},
        aligned=["a", "b", "c", "N", "K"],
        **options,
    )
    stats = k((triton.cdiv(M, 64), triton.cdiv(N, 64)), a, b, c, M, N, K, seed=1)
    want = a.double() @ b.double()
    assert (c.double() - want).abs().max().item() < tol * K**0.5
    return k, stats


@pytest.mark.parametrize("dtype,name", [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_pipelined_matmul(dtype, name):
    k, stats = run_matmul(dtype, name, "tf32", 96, 80, 160, 1e-5, num_stages=3)
    for word in ("cp.async", "ldmatrix", "mma.sync"):
        assert word in k.ptx
    assert stats["mma"][f"m16n8k16 {'f16' if name == 'fp16' else 'bf16'}"] > 0
    assert stats["shared"]["wavefronts"] >= stats["shared"]["ideal_wavefronts"] > 0


@pytest.mark.parametrize("precision,tol", [("ieee", 1e-5), ("tf32x3", 2e-5), ("tf32", 5e-3)])
def test_fp32_matmul(precision, tol):
    run_matmul(torch.float32, "fp32", precision, 64, 64, 96, tol)


@triton.jit
def reductions_kernel(x, s, c, o, R: tl.constexpr, B: tl.constexpr):
    r, i = tl.arange(0, R), tl.arange(0, B)
    v = tl.load(x + r[:, None] * B + i[None, :])
    tl.store(s + r, tl.sum(v, 1))
    tl.store(c + r[:, None] * B + i[None, :], tl.cumsum(v, 1))
    tl.store(o + r[:, None] * B + i[None, :], tl.sort(v, 1))


def test_sum_cumsum_sort():
    x = torch.randn(8, 64)
    s, c, o = torch.zeros(8), torch.zeros(8, 64), torch.zeros(8, 64)
    build(reductions_kernel, {"x": "*fp32", "s": "*fp32", "c": "*fp32", "o": "*fp32"}, {"R": 8, "B": 64})(1, x, s, c, o, seed=5)
    assert torch.allclose(s, x.sum(1), atol=1e-5)
    assert torch.allclose(c, x.cumsum(1), atol=1e-5)
    assert torch.equal(o, x.sort(1).values)


@triton.jit
def histogram_kernel(x, h, total, B: tl.constexpr):
    v = tl.load(x + tl.program_id(0) * B + tl.arange(0, B))
    tl.atomic_add(h + v, 1)
    tl.atomic_add(total, tl.sum(v.to(tl.float32), 0))


def test_atomics():
    x = torch.randint(0, 16, (1024,), dtype=torch.int32)
    h, total = torch.zeros(16, dtype=torch.int32), torch.zeros(1)
    stats = build(histogram_kernel, {"x": "*i32", "h": "*i32", "total": "*fp32"}, {"B": 256})(4, x, h, total, seed=2)
    assert torch.equal(h.long(), torch.bincount(x, minlength=16)) and total.item() == x.sum().item()
    assert stats["global"]["atomic"]["requests"] > 0


@triton.jit
def static_range_kernel(x, idx, o, n, P: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B).to(tl.int64)
    acc = tl.zeros((B,), tl.float32)
    for p in tl.static_range(P):
        acc += tl.load(x + p * n + i) * (p + 1)
    g = tl.gather(acc, tl.load(idx + tl.arange(0, B)), 0)
    tl.store(o + i, tl.where(g > 0, g, -2 * g))


def test_static_range_int64_where_gather():
    P, n = 3, 256
    x, idx, o = torch.randn(P, n), torch.randint(0, 128, (128,), dtype=torch.int32), torch.zeros(n)
    build(static_range_kernel, {"x": "*fp32", "idx": "*i32", "o": "*fp32", "n": "i64"}, {"P": P, "B": 128})(2, x, idx, o, n)
    acc = (x * torch.arange(1, P + 1)[:, None]).sum(0).view(2, 128)[:, idx.long()].reshape(-1)
    assert torch.allclose(o, torch.where(acc > 0, acc, -2 * acc), atol=1e-5)


@triton.jit
def shrink_kernel(x, w, c, o, T, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.arange(0, R)
    acc = tl.zeros((BT, R), tl.float32)
    for k in range(0, D, BK):
        kk = k + tl.arange(0, BK)
        xv = tl.load(x + t[:, None] * D + kk[None, :], mask=t[:, None] < T, other=0.0)
        for p in tl.static_range(P):
            cv = tl.load(c + t[:, None] * (P * D) + p * D + kk[None, :], mask=t[:, None] < T, other=0.0)
            acc += tl.dot(xv * cv, tl.load(w + (p * D + kk[:, None]) * R + r[None, :]))
    tl.store(o + t[:, None] * R + r[None, :], acc, mask=t[:, None] < T)


@pytest.mark.parametrize("aligned", [[], ["x", "w", "c", "o"]])
def test_lora_shrink(aligned):
    T, D, R, P = 20, 128, 16, 2
    torch.manual_seed(1)
    x, w, c = torch.randn(T, D).bfloat16(), torch.randn(P * D, R).bfloat16(), torch.randn(T, P * D).bfloat16()
    o = torch.zeros(T, R)
    k = build(
        shrink_kernel,
        {"x": "*bf16", "w": "*bf16", "c": "*bf16", "o": "*fp32", "T": "i32"},
        {"D": D, "R": R, "P": P, "BT": 16, "BK": 64},
        aligned=aligned,
    )
    k(2, x, w, c, o, T, seed=4)
    want = sum((x * c[:, p * D : (p + 1) * D]).double() @ w[p * D : (p + 1) * D].double() for p in range(P))
    assert (o.double() - want).abs().max() < 1e-3


@triton.jit
def math_kernel(x, h, i, o, q, r, B: tl.constexpr):
    k = tl.arange(0, B)
    v = tl.load(x + k)
    tl.store(
        o + k,
        tl.sin(v)
        + tl.cos(v)
        + tl.log(tl.abs(v) + 1)
        + tl.sqrt(tl.abs(v))
        + tl.rsqrt(tl.abs(v) + 1)
        + tl.exp2(v)
        + tl.sigmoid(v)
        + tl.erf(v)
        + tl.floor(v),
    )
    hv = tl.load(h + k)
    tl.store(q + k, (hv * hv + hv).to(tl.float16))
    iv = tl.load(i + k)
    tl.store(r + k, (iv // 7) * 3 + iv % 5 + (iv >> 2) + (iv ^ 0x55))


def test_elementwise_math():
    x, h, i = torch.randn(256) * 3, torch.randn(256).half(), torch.randint(0, 10000, (256,), dtype=torch.int32)
    o, q, r = torch.zeros(256), torch.zeros(256).half(), torch.zeros(256, dtype=torch.int32)
    build(math_kernel, {"x": "*fp32", "h": "*fp16", "i": "*i32", "o": "*fp32", "q": "*fp16", "r": "*i32"}, {"B": 256})(
        1, x, h, i, o, q, r
    )
    d = x.double()
    want = (
        d.sin()
        + d.cos()
        + (d.abs() + 1).log()
        + d.abs().sqrt()
        + (d.abs() + 1).rsqrt()
        + d.exp2()
        + d.sigmoid()
        + torch.erf(d)
        + d.floor()
    )
    assert torch.allclose(o.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.allclose(q.float(), h.float() * h.float() + h.float(), rtol=2e-3, atol=2e-3)
    assert torch.equal(r, (i // 7) * 3 + i % 5 + (i >> 2) + (i ^ 0x55))


def test_sm90_small_tiles_use_mma_sync():
    torch.manual_seed(0)
    T, D, R, P = 16, 64, 16, 1
    x, w, c, o = torch.randn(T, D).bfloat16(), torch.randn(D, R).bfloat16(), torch.ones(T, D).bfloat16(), torch.zeros(T, R)
    k = build(
        shrink_kernel,
        {"x": "*bf16", "w": "*bf16", "c": "*bf16", "o": "*fp32", "T": "i32"},
        {"D": D, "R": R, "P": P, "BT": 16, "BK": 64},
        capability=90,
    )
    k(1, x, w, c, o, T)
    assert (o.double() - x.double() @ w.double()).abs().max() < 1e-3


def test_sm90_wgmma_is_named_at_load():
    signature = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    constexprs = {"BM": 64, "BN": 64, "BK": 32, "PREC": "tf32"}
    full = {n: "constexpr" if n in constexprs else signature[n] for n in matmul_kernel.arg_names}
    k = ptxsim.compile_triton(matmul_kernel, full, constexprs, capability=90)
    assert any("wgmma" in u for u in k.unsupported)
    with pytest.raises(ptxsim.SimulationError, match="unsupported instruction wgmma"):
        k((1, 1), torch.zeros(64, 32).half(), torch.zeros(32, 64).half(), torch.zeros(64, 64), 64, 64, 32)


@triton.jit
def attention_kernel(q, k, v, o, N, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rm, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    qv = tl.load(q + rm[:, None] * D + d[None, :])
    m, s, acc = tl.full((BM,), -1e30, tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM, D), tl.float32)
    for j in range(0, N, BN):
        rn = j + tl.arange(0, BN)
        scores = tl.dot(qv, tl.trans(tl.load(k + rn[:, None] * D + d[None, :]))) * 0.125
        top = tl.maximum(m, tl.max(scores, 1))
        p, shrink = tl.exp(scores - top[:, None]), tl.exp(m - top)
        s = s * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(qv.dtype), tl.load(v + rn[:, None] * D + d[None, :]))
        m = top
    tl.store(o + rm[:, None] * D + d[None, :], acc / s[:, None])


@pytest.mark.parametrize("num_warps", [1, 4])
def test_attention(num_warps):
    torch.manual_seed(0)
    q, k, v, o = *[torch.randn(64, 64).bfloat16() for _ in range(3)], torch.zeros(64, 64)
    kernel = build(
        attention_kernel,
        {"q": "*bf16", "k": "*bf16", "v": "*bf16", "o": "*fp32", "N": "i32"},
        {"D": 64, "BM": 32, "BN": 32},
        aligned="qkvoN",
        num_warps=num_warps,
    )
    kernel(2, q, k, v, o, 64, seed=1)
    assert (o - torch.softmax(q.float() @ k.float().T * 0.125, 1) @ v.float()).abs().max() < 5e-3


@triton.jit
def single_dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    tl.store(
        c + i[:, None] * N + j[None, :],
        tl.dot(tl.load(a + i[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + j[None, :])),
    )


@pytest.mark.parametrize("kind", ["i8", "fp8e5", "fp64"])
def test_other_dot_types(kind):
    make = {
        "i8": lambda *s: torch.randint(-128, 128, s, dtype=torch.int8),
        "fp8e5": lambda *s: torch.randn(s).to(torch.float8_e5m2),
        "fp64": lambda *s: torch.randn(s).double(),
    }[kind]
    out, wide = {"i8": ("i32", torch.int32), "fp8e5": ("fp32", torch.float32), "fp64": ("fp64", torch.float64)}[kind]
    a, b, c = make(32, 64), make(64, 32), torch.zeros(32, 32, dtype=wide)
    kernel = build(
        single_dot_kernel, {"a": f"*{kind}", "b": f"*{kind}", "c": f"*{out}"}, {"M": 32, "N": 32, "K": 64}, aligned="abc"
    )
    stats = kernel(1, a, b, c)
    assert (c - a.to(wide) @ b.to(wide)).abs().max() < 1e-4 and stats["mma"]


def test_every_barrier_of_the_shrink_kernel_is_needed():
    """Mutation test: with any one bar.sync removed, the checks must object."""
    T, D, R, P = 20, 128, 16, 2
    torch.manual_seed(1)
    args = (
        torch.randn(T, D).bfloat16(),
        torch.randn(P * D, R).bfloat16(),
        torch.randn(T, P * D).bfloat16(),
        torch.zeros(T, R),
        T,
    )
    k = build(
        shrink_kernel,
        {"x": "*bf16", "w": "*bf16", "c": "*bf16", "o": "*fp32", "T": "i32"},
        {"D": D, "R": R, "P": P, "BT": 16, "BK": 64},
    )
    k(2, *args)
    lines = k.ptx.split("\n")
    barriers = [i for i, line in enumerate(lines) if line.strip().startswith("bar.sync")]
    assert len(barriers) >= 8
    for i in barriers:
        k.module = ptxsim.Module("\n".join([*lines[:i], "", *lines[i + 1 :]]))
        with pytest.raises(ptxsim.SimulationError, match=r"data race|never written"):
            k(2, *args)
