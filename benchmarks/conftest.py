"""Every benchmark runs as workload → turn → contender: each turn times us and all our peers one after another, so that
whatever else the machine does hits all of them alike, and run.py pools the turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from .peers import Absent
from .timing import Others, threads
from .workloads import Workload


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--turns", type=int, default=3, help="how often every group of contenders is timed (default 3)")
    parser.addoption(
        "--patience", type=float, default=0.0, help="seconds to wait, over the whole run, while others use the processor"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module lists its WORKLOADS and CONTENDERS, {name: prepare}; here they become tests, in the order above."""
    if "contender" not in metafunc.fixturenames:
        return
    cases = [
        pytest.param(workload, turn, contender, id=f"{workload.name}-{turn}-{contender}")
        for workload in metafunc.module.WORKLOADS
        for turn in range(metafunc.config.getoption("turns"))
        for contender in metafunc.module.CONTENDERS
        if workload.contenders is None or contender in workload.contenders
    ]
    metafunc.parametrize(("workload", "turn", "contender"), cases)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "contender" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(disable_gc=True))


class Prepared:
    """The inputs of the workload being run and what its contenders prepared from them; those of the last one are let go."""

    def __init__(self) -> None:
        self._workload: Workload | None = None
        self._inputs: Any = None
        self._calls: dict[str, tuple[Any, float]] = {}

    def call(
        self, workload: Workload, contender: str, prepare: Callable[[Any], Any], check: Callable[[Any, str, Any], float]
    ) -> tuple[Any, float]:
        """What `prepare` made of the inputs, and the seconds one call took `check`, which is run once and must pass."""
        if self._workload is not workload:
            self._calls.clear()
            self._inputs = None
            self._workload, self._inputs = workload, workload.make()
        if contender not in self._calls:
            try:
                call = prepare(self._inputs)
            except Absent as reason:
                pytest.skip(str(reason))
            self._calls[contender] = call, check(self._inputs, contender, call)
        return self._calls[contender]


@pytest.fixture(scope="session")
def prepared() -> Prepared:
    return Prepared()


@pytest.fixture(scope="session")
def others(request: pytest.FixtureRequest) -> Others:
    return Others(request.config.getoption("patience"))


@pytest.fixture(autouse=True)
def _setting(request: pytest.FixtureRequest, others: Others) -> Iterator[None]:
    """The workload's threads and no autograd; and what run.py needs to know beside the times."""
    if "contender" not in request.fixturenames:
        yield
        return
    workload, turn, contender = (request.getfixturevalue(name) for name in ("workload", "turn", "contender"))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = workload.name
    benchmark.extra_info.update(workload=workload.name, turn=turn, contender=contender)
    others.wait()
    others.start()
    with threads(workload.threads), torch.inference_mode():
        yield
    benchmark.extra_info["others"] = others.share()
