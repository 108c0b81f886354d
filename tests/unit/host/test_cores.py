"""Which cores the workers' main threads keep to."""

from __future__ import annotations

import logging
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.cluster.resolve import with_cores, worker_cores
from afd.config import parse_cores, resolve_config
from afd.errors import ConfigError
from afd.host.cores import pin_this_thread, share_cores, thread_cores


def test_lists() -> None:
    assert parse_cores("0,2-3") == {0, 2, 3}
    assert parse_cores("") == parse_cores("any") == set()


@pytest.mark.parametrize("text", ["x", "1-", "3-2", "0,,1", "-1", "0;1", "²"])
def test_what_is_no_list_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^ffn\.cores: "):
        resolve_config(None, {"ffn.cores": text})


@given(st.integers(0, 12), st.integers(1, 8), st.integers(1, 12))
def test_shares_are_equal_and_nobodys_twice(num_cores: int, num_workers: int, usable: int) -> None:
    shares = [parse_cores(text) for text in share_cores(range(10, 10 + num_cores), num_workers, usable)]
    assert len(shares) == num_workers and len({len(share) for share in shares}) == 1
    assert len(shares[0]) == min(num_cores, usable) // num_workers
    assert len(set().union(*shares)) == sum(map(len, shares))


def test_each_worker_of_a_host_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 2, 8})
    monkeypatch.setattr("afd.cluster.resolve.usable_cores", lambda: 4)
    config = resolve_config(None, {"cluster.topology": "1A1F", "ffn.cores": "5"})
    assert worker_cores(config) == {"attention/0": "1,2", "ffn/0": "3,8"}
    assert with_cores(config, "attention", "1,2").attention.cores == "1,2"
    assert with_cores(config, "ffn", "3,8").ffn.cores == "5", "what is configured stays"
    assert with_cores(config, "gateway", "") == config
    crowded = worker_cores(resolve_config(None, {"cluster.topology": "3A2F"}))
    assert set(crowded.values()) == {""}, "five workers on four cores: the kernel decides"
    assert worker_cores(resolve_config(None, {"cluster.topology": "mono"})) == {"attention/0": "1,2,3,8"}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({2}, ({2}, {2}, {0, 1, 3})),
        ({1, 2}, ({1}, {2}, {0, 3})),
        ({0, 1, 2, 3}, ({0}, {1, 2, 3}, {1, 2, 3})),
        (set(), ({0, 1, 2, 3},) * 3),
    ],
)
def test_helping_threads_keep_off_the_main_threads_core(own: set[int], expected: tuple[set[int], ...]) -> None:
    assert thread_cores(own, {0, 1, 2, 3}) == expected


def test_a_thread_and_those_it_starts_keep_to_their_cores(caplog: pytest.LogCaptureFixture) -> None:
    mine = sorted(os.sched_getaffinity(0))
    seen: list[set[int]] = []

    def run() -> None:
        pin_this_thread({mine[-1]})
        inner = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        inner.start()
        inner.join()
        pin_this_thread(set())
        seen.append(os.sched_getaffinity(0))
        with caplog.at_level(logging.WARNING):
            pin_this_thread({100000})

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [{mine[-1]}, {mine[-1]}]
    assert sorted(os.sched_getaffinity(0)) == mine, "the caller's own stay as they were"
    assert "cannot keep to cores 100000" in caplog.text
