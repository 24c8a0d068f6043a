"""Planted bugs must be reported, correct programs must not; and the counters count."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import ptxsim

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
HERE = Path(__file__).resolve().parent
F = np.float32


@pytest.fixture(scope="module")
def mod():
    return ptxsim.compile_cuda(HERE / "bugs.cu")


def floats(n):
    return np.arange(n, dtype=F)


def fails(mod, match, *launch, **options):
    with pytest.raises(ptxsim.SimulationError, match=match) as caught:
        mod.launch(*launch, **options)
    return str(caught.value)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_missing_syncthreads(mod, seed):
    text = fails(mod, "shared memory data race|never written", "missing_barrier", 1, 128, [floats(128), floats(128)], seed=seed)
    assert "kernel missing_barrier, PTX line" in text and "block (0,0,0)" in text
    fails(
        mod, "shared memory data race", "missing_barrier", 1, 128, [floats(128), floats(128)], seed=seed, check=["shared_race"]
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_write_after_read_race(mod, seed):
    fails(
        mod,
        "shared memory data race: writes offset .* read without a barrier|shared memory data race: reads",
        "missing_second_barrier",
        1,
        128,
        [floats(512), floats(128), 4],
        seed=seed,
    )
    mod.launch("missing_second_barrier", 1, 128, [floats(512), floats(128), 1], seed=seed)


def test_missing_syncwarp(mod):
    fails(mod, "data race", "missing_syncwarp", 1, 32, [floats(32), floats(32), 0])
    y = np.zeros(32, F)
    mod.launch("missing_syncwarp", 1, 32, [floats(32), y, 1])
    assert np.array_equal(y, floats(32)[::-1])


def test_out_of_bounds_by_one(mod):
    x, y = np.zeros(101, F), np.zeros(101, F)
    text = fails(mod, r"thread \(4,0,0\).*global access of 4 bytes out of bounds", "off_by_one", 4, 32, [x[:100], y[:100], 100])
    assert "nearest array: argument 0" in text and "byte offset 400" in text
    mod.launch("off_by_one", 4, 32, [x[:100], y[:100], 99])
    fails(mod, "out of bounds", "off_by_one", 4, 32, [x[:100], y[:100], 100], check=False)  # bounds are always checked


def test_null_pointer(mod):
    fails(mod, "out of bounds at 0x0", "off_by_one", 1, 32, [None, floats(32), 31])


def test_misaligned_vector_load(mod):
    x = floats(129)
    mod.launch("vector_load", 1, 32, [x[:128], floats(32)])
    fails(mod, "misaligned 16-byte global access", "vector_load", 1, 32, [x[1:], floats(32)])


def test_uninitialised_shared_read(mod):
    fails(
        mod,
        r"thread \(0,0,0\): reads shared memory at offset 252 that was never written",
        "uninitialised",
        1,
        64,
        [floats(64), floats(64)],
    )


def test_missing_async_wait(mod):
    x, y = floats(256), np.zeros(256, F)
    mod.launch("async_copy", 1, 64, [x, y, 1])
    assert np.array_equal(y.reshape(64, 4), x.reshape(64, 4)[::-1])
    fails(mod, "cp.async .missing wait", "async_copy", 1, 64, [x, y, 0])
    mod.launch("async_copy", 1, 64, [x, y, 0], check=False)
    assert not np.array_equal(y.reshape(64, 4), x.reshape(64, 4)[::-1])  # the data lands only at a wait


def test_barrier_in_divergent_code(mod):
    fails(mod, "barrier in divergent code", "divergent_barrier", 1, 32, [floats(32)])
    fails(mod, "barrier in divergent code", "two_barriers", 1, 32, [floats(32)])


def test_deadlock_names_the_waiting_warps(mod):
    text = fails(mod, "deadlock", "named_barrier_deadlock", 1, 64, [floats(64)], check=False)
    assert "Warp 0 lanes 0xffffffff" in text and "barrier 1" in text and "Warp 1" in text and "barrier 2" in text


def test_early_exit_can_be_allowed(mod):
    fails(mod, "barrier in divergent code", "early_exit", 1, 64, [floats(64), 40])
    mod.launch("early_exit", 1, 64, [floats(64), 40], allow_early_exit=True)
    mod.launch("early_exit", 1, 64, [floats(64), 32])  # whole warps may leave


def test_global_races_between_blocks(mod):
    fails(mod, "global data race between blocks: this thread writes", "same_output", 2, 32, [floats(64), floats(32)])
    fails(mod, "global data race between blocks: this thread", "reads_other_block", 3, 32, [floats(96)])
    fails(mod, "write different values", "same_instruction", 1, 32, [floats(32)])
    mod.launch("same_output", 1, 32, [floats(64), floats(32)])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fence_and_atomic_are_not_a_race(mod, seed):
    y, ticket = np.zeros(1, F), np.zeros(1, np.uint32)
    mod.launch("last_block_sums", 4, 1, [floats(4), np.zeros(4, F), ticket, y], seed=seed)
    assert y[0] == 6


def test_instruction_limit(mod):
    fails(mod, "instruction limit", "endless", 1, 32, [np.zeros(1, np.int32)], instruction_limit=100000)


def test_shuffles_with_missing_lanes(mod):
    fails(mod, "which does not take part", "shuffle_from_idle_lane", 1, 32, [floats(32), floats(32)])
    mod.launch("missing_member", 1, 32, [floats(32), floats(32), 0])  # lanes that have exited need not take part
    fails(mod, "deadlock.*shfl.sync", "missing_member", 1, 32, [floats(32), floats(32), 1])


# ---- statistics -------------------------------------------------------------
def test_coalescing(mod):
    s = mod.launch("copy", 4, 128, [floats(512), np.zeros(512, F), 1])
    assert s["global"]["load"] == {"requests": 16, "sectors": 64, "ideal_sectors": 64, "bytes": 2048, "efficiency": 1.0}
    assert s["global"]["store"]["efficiency"] == 1.0
    s = mod.launch("copy", 4, 128, [floats(1024), np.zeros(1024, F), 2])
    assert s["global"]["load"]["efficiency"] == 0.5 and s["global"]["store"]["efficiency"] == 0.5
    s = mod.launch("copy4", 1, 64, [floats(256), np.zeros(256, F)])
    assert s["widest_global_load"] == 16 and s["global"]["load"]["efficiency"] == 1.0
    assert "efficiency 1.000" in ptxsim.report(s, hot=3)


def test_bank_conflicts(mod):
    def read_wavefronts(stride):
        s = mod.launch("bank_conflict", 1, 32, [floats(32), stride])
        return next(
            r["wavefronts"]
            for r in s["per_instruction"]
            if r["opcode"].startswith("ld.volatile.shared") or (r["class"] == "load shared")
        )

    assert [read_wavefronts(s) for s in (1, 2, 8, 32, 33, 0)] == [1, 2, 8, 32, 1, 1]


def test_instruction_classes(mod):
    s = mod.launch("arithmetic", 1, 64, [floats(64), 100])
    assert s["by_class"]["fp32"]["warp"] >= 2 * 200 and s["by_class"]["integer"]["thread"] >= 64 * 300


def test_speed(mod):
    """The goals are 20 and 5 million thread instructions per second; normally it is far above."""

    def rate(kernel, args, check):
        start = time.perf_counter()
        s = mod.launch(kernel, 4, 256, args, check=check)
        return s["thread_instructions"] / (time.perf_counter() - start)

    y = np.zeros(1024, F)
    rates = {
        (k, c): rate(k, a, c)
        for k, a in (("arithmetic", [y, 2000]), ("shared_traffic", [floats(256), y, 100]))
        for c in (False, True)
    }
    print({k: f"{v / 1e6:.0f} M/s" for k, v in rates.items()})
    assert min(v for (k, c), v in rates.items() if not c) > 20e6
    assert min(v for (k, c), v in rates.items() if c) > 5e6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_part_of_a_warp_syncs(mod, seed):
    """What eight lanes read is ordered by their own barrier, whatever the warp's other lanes do; not by a smaller one."""
    out = np.zeros(32, np.int32)
    mod.launch("part_of_a_warp_syncs", 1, 32, [out], seed=seed)
    assert (out == [1] * 8 + [0] * 24).all()
    fails(mod, "shared memory data race: writes offset", "too_small_a_part_syncs", 1, 32, [out], seed=seed)
