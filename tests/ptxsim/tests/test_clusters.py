"""Clusters: which block of one a block is, its peers' shared memory, its barriers, and what is done wrongly with them."""

import numpy as np
import pytest

import ptxsim

HEADER = ".version 8.4\n.target sm_90\n.address_size 64\n"
MEET = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
# Each thread keeps 100 · block + thread, then the blocks meet, then each reads its next peer's; then they meet again.
KERNEL = (
    HEADER
    + """
.visible .entry k(.param .u64 out)
{{
  .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
  .shared .align 4 .b8 kept[256];
  ld.param.u64 %rd0, [out];
  mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, %cluster_nctarank;
  mov.u32 %r4, %ntid.x; mad.lo.u32 %r5, %r1, %r4, %r0; mul.wide.u32 %rd1, %r5, 4; add.u64 %rd0, %rd0, %rd1;
  mad.lo.u32 %r6, %r1, 100, %r0;
  mov.u32 %r7, kept; mad.lo.u32 %r7, %r0, 4, %r7;
  add.u32 %r8, %r2, 1; rem.u32 %r8, %r8, %r3;
  {body}
  st.global.u32 [%rd0], %r10;
  ret;
}}
"""
)
KEEP = "st.shared.u32 [%r7], %r6;"
READ = "mapa.shared::cluster.u32 %r9, %r7, %r8; ld.shared::cluster.u32 %r10, [%r9];"


def run(body: str, blocks: int = 8, cluster: int = 4, threads: int = 64, **settings: object) -> np.ndarray:
    out = np.zeros((blocks, threads), np.uint32)
    ptxsim.Module(KERNEL.format(body=body)).launch("k", blocks, threads, [out], cluster=cluster, **settings)
    return out


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_peers(cluster: int, seed: int) -> None:
    """Reads a peer's values through both forms of its address; and writes to a peer."""
    peer = [block // cluster * cluster + (block % cluster + 1) % cluster for block in range(8)]
    expected = np.array(peer)[:, None] * 100 + np.arange(64)
    generic = "cvta.shared.u32 %r9, %r7; cvt.u64.u32 %rd2, %r7; cvta.shared.u64 %rd2, %rd2; mapa.u64 %rd3, %rd2, %r8;"
    for read in (READ, generic + "ld.u32 %r10, [%rd3];"):
        assert np.array_equal(run(KEEP + MEET + read + MEET, cluster=cluster, seed=seed), expected)
    write = "mapa.shared::cluster.u32 %r9, %r7, %r8; st.shared::cluster.u32 [%r9], %r6;" + MEET + "ld.shared.u32 %r10, [%r7];"
    before = [block // cluster * cluster + (block % cluster - 1) % cluster for block in range(8)]
    assert np.array_equal(run(write + MEET, cluster=cluster, seed=seed), np.array(before)[:, None] * 100 + np.arange(64))


def test_a_barrier_of_the_cluster_is_one_of_the_block() -> None:
    mirrored = "mov.u32 %r9, kept; sub.u32 %r11, 63, %r0; mad.lo.u32 %r9, %r11, 4, %r9; ld.shared.u32 %r10, [%r9];"
    assert np.array_equal(run(KEEP + MEET + mirrored, seed=1), np.arange(8)[:, None] * 100 + np.arange(64)[::-1])
    with pytest.raises(ptxsim.SimulationError, match=r"data race|never written"):
        for seed in range(3):
            run(KEEP + mirrored, seed=seed)


def test_special_registers() -> None:
    for name, expected in {
        "%cluster_ctarank": [0, 1, 2, 3, 0, 1, 2, 3],
        "%cluster_nctarank": [4] * 8,
        "%cluster_ctaid.x": [0, 1, 2, 3, 0, 1, 2, 3],
        "%cluster_nctaid.x": [4] * 8,
        "%clusterid.x": [0] * 4 + [1] * 4,
        "%nclusterid.x": [2] * 8,
    }.items():
        assert run(f"mov.u32 %r10, {name};")[:, 0].tolist() == expected
    assert run(READ.partition(";")[0] + "; getctarank.shared::cluster.u32 %r10, %r9;")[:, 0].tolist() == [1, 2, 3, 0] * 2


def test_clusters_in_other_directions() -> None:
    text = KERNEL.format(body="mov.u32 %r10, %cluster_ctarank;").replace("%r1, %ctaid.x", "%r1, %ctaid.y")
    out = np.zeros((6, 32), np.uint32)
    ptxsim.Module(text).launch("k", (1, 6, 1), 32, [out], cluster=(1, 3, 1))
    assert out[:, 0].tolist() == [0, 1, 2, 0, 1, 2]


WRONG = {
    "reads what was never written": (MEET + READ + MEET, "never written"),
    "reads before the barrier": (KEEP + READ + MEET, "never written|data race"),
    "reads after the peer has exited": (KEEP + MEET + READ, "has exited|exits while"),
    "writes over what a peer reads": (KEEP + MEET + READ + KEEP.replace("%r6", "%r0") + MEET, "data race"),
    "writes what a peer reads at once": (
        KEEP
        + MEET
        + "mapa.shared::cluster.u32 %r9, %r7, %r8; st.shared::cluster.u32 [%r9], %r0; ld.shared.u32 %r10, [%r7];"
        + MEET,
        "data race",
    ),
    "no such peer": ("mapa.shared::cluster.u32 %r9, %r7, 4;", "no block 4"),
    "out of a peer's bounds": (KEEP + MEET + READ.replace("[%r9]", "[%r9+256]") + MEET, "out of bounds"),
    "a peer's address in the block's own window": (
        KEEP + MEET + READ.replace("ld.shared::cluster", "ld.shared"),
        "out of bounds",
    ),
    "waits without having arrived": ("barrier.cluster.wait.acquire;", "not arrived at"),
    "arrives twice": ("barrier.cluster.arrive.release;" * 2, "arrives twice"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wrong(name: str, seed: int) -> None:
    body, message = WRONG[name]
    with pytest.raises(ptxsim.SimulationError, match=message):
        run(body, seed=seed)


def test_some_threads_never_arrive() -> None:
    """Nobody waits for those that have left; for those that wait for the block instead, all do."""
    body = "setp.lt.u32 %p0, %r0, 32; @%p0 bra DONE;" + MEET + "DONE: mov.u32 %r10, 1;"
    assert run(body, allow_early_exit=True).all()
    with pytest.raises(ptxsim.SimulationError, match="deadlock"):
        run("setp.eq.u32 %p0, %r2, 0; @%p0 bar.sync 0;" + MEET.replace("barrier", "@!%p0 barrier") + "@!%p0 bar.sync 0, 128;")


def test_a_grid_of_whole_clusters() -> None:
    with pytest.raises(ptxsim.SimulationError, match="not a multiple"):
        run("mov.u32 %r10, 0;", blocks=6)
    with pytest.raises(ptxsim.SimulationError, match="more than 16"):
        run("mov.u32 %r10, 0;", blocks=32, cluster=32)
