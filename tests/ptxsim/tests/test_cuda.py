"""CUDA C++ kernels compiled by nvcc, against numpy."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import ptxsim

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
HERE = Path(__file__).resolve().parent
F = np.float32


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def mod(request):
    m = ptxsim.compile_cuda(HERE / "kernels.cu", arch=request.param)
    assert {k: v["unsupported"] for k, v in m.kernels.items() if v["unsupported"]} == {}
    return m


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_warp_reduce(mod, rng):
    x, y = rng.standard_normal(1024).astype(F), np.zeros(4, F)
    stats = mod.launch("warp_reduce", 4, 256, [x, y], seed=1)
    assert np.allclose(y, x.reshape(4, -1).sum(1), atol=1e-4)
    assert stats["barriers_per_warp"] == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tiled_matmul(mod, rng, seed):
    n = 48
    a, b, c = rng.standard_normal((n, n)).astype(F), rng.standard_normal((n, n)).astype(F), np.zeros((n, n), F)
    mod.launch("tiled_matmul", (3, 3), (16, 16), [a, b, c, n], seed=seed)
    assert np.allclose(c, a @ b, atol=1e-4)


def test_dynamic_shared(mod):
    x, y = np.arange(300, dtype=np.int32), np.zeros(300, np.int32)
    stats = mod.launch("reverse_dynamic", 1, 128, [x, y, 300], shared_bytes=1200)
    assert (y == x[::-1]).all() and stats["shared_bytes"] == 1200
    with pytest.raises(ptxsim.SimulationError, match="shared access of 4 bytes out of bounds"):
        mod.launch("reverse_dynamic", 1, 128, [x, y, 300], shared_bytes=1196)


def test_jacobi_eigen_solver(mod, rng):
    count = 40
    g = rng.standard_normal((count, 12, 8)).astype(F)
    a = np.einsum("bki,bkj->bij", g, g).astype(F)
    values, vectors = np.zeros((count, 8), F), np.zeros((count, 8, 8), F)
    stats = mod.launch("jacobi8", 2, 32, [a, values, vectors, count, 8])
    want = np.linalg.eigvalsh(a.astype(np.float64))
    assert np.allclose(np.sort(values, 1), want, rtol=1e-4, atol=1e-4)
    rebuilt = np.einsum("bik,bk,bjk->bij", vectors, values, vectors)
    assert np.abs(rebuilt - a).max() < 1e-3
    assert stats["local"]["requests"] == 0  # everything in registers


def test_warp_gram(mod, rng):
    rows = 70
    a, g = rng.standard_normal((4, rows, 8)).astype(F), np.zeros((4, 8, 8), F)
    stats = mod.launch("warp_gram", 2, 64, [a, g, rows])
    assert np.allclose(g, np.einsum("bki,bkj->bij", a, a), atol=1e-3)
    assert stats["widest_global_load"] == 16


def bf16_round(x):
    b = np.asarray(x, F).view(np.uint32)
    return ((b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000).view(F)


def test_half_and_bfloat(mod, rng):
    n = 40
    h = rng.standard_normal((n, 2)).astype(np.float16)
    b = bf16_round(rng.standard_normal((n, 2)))
    b16 = (b.view(np.uint32) >> 16).astype(np.uint16)
    ho, bo, f = np.zeros_like(h), np.zeros_like(b16), np.zeros(n, F)
    mod.launch("half_math", 1, 64, [h, b16, ho, bo, f, n])
    h64 = h.astype(np.float64)
    assert np.array_equal(ho, ((h64 * h64 + h64).astype(np.float16).astype(F) + np.abs(h).astype(F)).astype(np.float16))
    assert np.array_equal((bo.astype(np.uint32) << 16).view(F), bf16_round(bf16_round(b * b) + np.minimum(b, np.abs(b))))
    want = (h.astype(F) * b).sum(1) + (h[:, 0] > h[:, 1]) + np.exp(h64[:, 0])
    assert (np.abs(f - want) <= 1e-3 * np.exp(h64[:, 0]) + 1e-5).all()  # hexp is rounded to half


@pytest.mark.parametrize("seed", [0, 7])
def test_cp_async_pipeline(mod, rng, seed):
    tiles = 5
    x, y = rng.standard_normal((tiles, 64, 4)).astype(F), np.zeros((64, 4), F)
    mod.launch("async_pipeline", 1, 64, [x, y, tiles], seed=seed)
    assert np.allclose(y, x.sum(0)[::-1], atol=1e-5)


def test_mma_bf16(mod, rng):
    a, bt = bf16_round(rng.standard_normal((16, 16))), bf16_round(rng.standard_normal((8, 16)))

    def pack(v):
        return (v.view(np.uint32) >> 16).astype(np.uint16)

    d = np.zeros((16, 8), F)
    stats = mod.launch("mma_bf16", 1, 32, [pack(a), pack(bt), d])
    exact = a.astype(np.float64) @ bt.astype(np.float64).T
    assert (np.abs(d) <= np.abs(exact)).all() and (np.abs(exact - d) < np.spacing(np.abs(d))).all()  # cut off, not rounded
    assert stats["mma"] == {"m16n8k16 bf16": 1}


def test_mma_s8_f64_f16(mod, rng):
    a, bt, d = (
        rng.integers(-128, 128, (16, 32), dtype=np.int8),
        rng.integers(-128, 128, (8, 32), dtype=np.int8),
        np.zeros((16, 8), np.int32),
    )
    da, dbt, dd = rng.standard_normal((8, 4)), rng.standard_normal((8, 4)), np.zeros((8, 8))
    ha, hbt, hd = (
        rng.standard_normal((16, 8)).astype(np.float16),
        rng.standard_normal((8, 8)).astype(np.float16),
        np.zeros((16, 8), np.float16),
    )
    mod.launch("mma_s8_f64_f16", 1, 32, [a, bt, d, da, dbt, dd, ha, hbt, hd])
    assert np.array_equal(d, a.astype(np.int32) @ bt.T.astype(np.int32))
    assert np.allclose(dd, da @ dbt.T)
    assert np.allclose(hd.astype(F), ha.astype(F) @ hbt.T.astype(F), atol=5e-3)


def test_atomics(mod, rng):
    x = rng.integers(0, 1000, 300, dtype=np.int32)
    bins, total, big, wide = np.zeros(16, np.int32), np.zeros(1, F), np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    mod.launch("atomics", 3, 128, [x, bins, total, big, wide, 300], seed=3)
    assert np.array_equal(bins, np.bincount(x & 15, minlength=16))
    assert total[0] == x.sum() and big[0] == x.max() and wide[0] == x.sum()


def test_local_array_with_dynamic_index(mod, rng):
    x, idx, y = rng.standard_normal((32, 16)).astype(F), rng.integers(0, 16, (32, 16), dtype=np.int32), np.zeros((32, 16), F)
    stats = mod.launch("dynamic_index", 1, 32, [x, idx, y])
    want = x.copy()
    for t in range(32):
        for i in range(16):
            k = idx[t, i]
            want[t, k], want[t, i] = want[t, i], want[t, k]
    assert np.array_equal(y, want) and stats["local"]["requests"] > 0


def test_templates(mod, rng):
    x, y = rng.standard_normal(192), np.zeros(192)
    double_name = next(k for k in mod.kernels if "scaled_copyId" in k)
    mod.launch(double_name, 2, 32, [x, y, 2.5])
    assert np.array_equal(y, 2.5 * x)
    i, j = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    mod.launch("scaled_copyIi", 2, 32, [i, j, -3])
    assert np.array_equal(j, -3 * i)


def test_device_functions(mod, rng):
    x, y = (rng.random(64) * 3).astype(F), np.zeros(64, F)
    mod.launch("device_functions", 1, 64, [x, y])
    i = np.arange(64)
    p = x.astype(np.float64) ** (i % 4)
    want = np.where(i % 3, p - np.floor(p) + 10 * np.floor(p), x.astype(np.float64) ** (i % 5))
    assert np.allclose(y, want, rtol=1e-4, atol=1e-4)


def test_intrinsics(mod, rng):
    x, u = rng.standard_normal(32).astype(F), rng.integers(1, 2**32, 32, dtype=np.uint64).astype(np.uint32)
    y, v = np.zeros(32, F), np.zeros(32, np.uint32)
    mod.launch("intrinsics", 1, 32, [x, u, y, v])
    from math import erf

    d = x.astype(np.float64)
    rz = F(1.1).astype(np.float64) * d
    rz32 = rz.astype(F)
    rz32 = np.where(np.abs(rz32.astype(np.float64)) > np.abs(rz), np.nextafter(rz32, F(0)), rz32)
    want = (
        d / 3
        + np.exp(d)
        + 1 / np.sqrt(np.abs(d) + 1)
        + np.log(np.abs(d) + 1)
        + np.sin(d)
        + np.tanh(d)
        + np.abs(d) ** 1.5
        + np.fmod(x, F(0.7))
        + np.vectorize(erf)(d)
        + rz32
        + np.sin((F(100000) * x).astype(np.float64))
    )
    assert np.allclose(y, want, rtol=1e-5, atol=1e-5)
    m = int(sum(1 << i for i in range(32) if x[i] > 0))
    for i in range(32):
        w = int(u[i])
        r = bin(m).count("1") + (32 - w.bit_length()) * 3 + int(f"{w:032b}"[::-1], 2)
        pool = w.to_bytes(4, "little") + m.to_bytes(4, "little")
        r += int.from_bytes(bytes(pool[(0x5140 >> (4 * k)) & 7] for k in range(4)), "little")
        r += (((m << 32 | w) << 7) >> 32) & 0xFFFFFFFF
        r += (w & -w).bit_length() + (w * m >> 32)
        r += ((w & 0xFFFF) + (m & 0xFFFF) & 0xFFFF) | (((w >> 16) + (m >> 16) & 0xFFFF) << 16)
        r += 5 + sum(p * q for p, q in zip(w.to_bytes(4, "little"), m.to_bytes(4, "little"), strict=False))
        r += (
            int((x > 5).any())
            + int((x > -9).all())
            + sum(1 << k for k in range(32) if (u[k] & 3) == (w & 3))
            + int((u & 255).sum())
        )
        assert v[i] == r & 0xFFFFFFFF


def test_structs_constants_switch_printf(mod, rng):
    settings = np.zeros(1, dtype=np.dtype([("scale", F), ("shift", "i4"), ("offset", "f8"), ("flags", "i2", 3)], align=True))
    settings["scale"], settings["shift"], settings["offset"], settings["flags"] = 2, 1, 0.5, [3, 4, 5]
    x, y = rng.standard_normal(32).astype(F), np.zeros(32, F)
    stats = mod.launch("structs_and_constants", 1, 32, [settings.tobytes(), x, y, 0])
    i = np.arange(32)
    r = 2 * x + np.array([1.5, 2.5, 3.5, 4.5], F)[(i + 1) & 3] + F(0.5) + np.array([3, 4, 5])[i % 3]
    want = np.select([i % 7 == k for k in range(6)], [r + 1, r * 2, -r, r + x[0], r - 4, r * r], 0)
    assert np.allclose(y, want, atol=1e-5)
    assert mod.variable("visits").view(np.int32)[0] == 12
    mod.variable("visits").view(np.int32)[0] = 7
    assert stats["printed"] == "kind 0 scale 2.00 done\n"


def test_assert_is_reported(mod):
    x = np.arange(32, dtype=np.int32)
    mod.launch("checked", 1, 32, [x])
    x[9] = -1
    with pytest.raises(ptxsim.SimulationError, match=r"thread \(9,0,0\): device assertion failed"):
        mod.launch("checked", 1, 32, [x])


def test_divergence(mod):
    y = np.zeros(64, np.int32)
    mod.launch("divergent", 1, 64, [y])
    steps = []
    for k in range(64):
        n = 0
        while k != 1 and n < 200:
            k = 1 if k == 0 else 3 * k + 1 if k & 1 else k // 2
            n += 1
        steps.append(n)
    steps = np.array(steps)
    assert np.array_equal(y, steps * 1000 + np.repeat(steps.reshape(2, 32).max(1), 32) + 32)


def test_integers(mod, rng):
    a, b, o = (
        rng.integers(-(2**31), 2**31, 64, dtype=np.int64).astype(np.int32),
        rng.integers(-(2**31), 2**31, 64, dtype=np.int64).astype(np.int32),
        np.zeros(64, np.int64),
    )
    mod.launch("integers", 1, 64, [a, b, o])

    def quotient(p, q):
        return abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)

    for i in range(64):
        x, y = int(a[i]), int(b[i])
        q = y | 1

        def wrap(v, n):
            return (v + (1 << (n - 1))) % (1 << n) - (1 << (n - 1))

        want = x * y + quotient(x << 5, q) + (x - quotient(x, q) * q) + wrap(quotient(x, q), 32)
        parts32 = (x & 0xFFFFFFFF) % ((y & 0xFFFFFFFF) | 1)
        want += (
            parts32
            + (x * y >> 32)
            + ((x << 30) * (y << 30) >> 64)
            + (x >> 3)
            + ((y & 0xFFFFFFFF) >> 3)
            + abs(x)
            + min(x, y)
            + wrap(x, 16)
            + wrap(y, 8)
        )
        assert wrap(want, 64) == o[i], i


def test_two_host_threads_and_speed(mod, rng):
    n = 64
    a, b, c = rng.standard_normal((n, n)).astype(F), rng.standard_normal((n, n)).astype(F), np.zeros((n, n), F)
    mod.launch("tiled_matmul", (4, 4), (16, 16), [a, b, c, n], check=False, host_threads=2)
    assert np.allclose(c, a @ b, atol=1e-4)
