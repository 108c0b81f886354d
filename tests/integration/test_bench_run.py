"""Whole benchmark runs: loops, warm-up, interruption, the command line, and our own gateway as the server."""

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from afd.cli.main import main
from afd.errors import ConfigError
from afd.load import load_loop, runner
from afd.load.http1 import ServerUrl
from afd.load.progress import Progress
from afd.load.record import Outcome
from afd.load.runner import BenchSettings, StoppedError, run_bench
from tests.fakes.async_test import async_test
from tests.fakes.gateway import served_gateway
from tests.fakes.openai_server import completion, fake_server

# What scripts that read `vllm bench serve --save-result` look for.
VLLM_KEYS = set(
    """date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency
    duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
    output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests
    mean_ttft_ms median_ttft_ms std_ttft_ms p99_ttft_ms mean_tpot_ms median_tpot_ms std_tpot_ms p99_tpot_ms
    mean_itl_ms median_itl_ms std_itl_ms p99_itl_ms mean_e2el_ms median_e2el_ms std_e2el_ms p99_e2el_ms
    """.split()  # noqa: SIM905
)
VLLM_DETAILED_KEYS = {"input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors"}


def settings(fake, **fields):
    return BenchSettings(ServerUrl.parse(fake.url), **{"input_len": 8, "output_len": 3, "num_prompts": 20} | fields)


async def run(fake, stop=None, **fields):
    return await run_bench(settings(fake, **fields), Progress(None), stop or asyncio.Event())


class Gauge:
    """A script that counts the requests running. The first ones are held until as many run as `release_at` says."""

    def __init__(self, release_at):
        self.running = self.peak = self.seen = 0
        self.arrived = asyncio.Event()
        self._release_at = release_at
        self._release = asyncio.Event()

    async def __call__(self, request, reply):
        self.running += 1
        self.seen += 1
        self.peak = max(self.peak, self.running)
        self.arrived.set()
        if self.running == self._release_at:
            self._release.set()
        try:
            await asyncio.wait_for(self._release.wait(), 10)
            await completion(request, reply)
        finally:
            self.running -= 1


NEVER = 0


@async_test
async def test_closed_loop_runs_as_many_as_it_should():
    gauge = Gauge(release_at=4)
    async with fake_server(gauge) as fake:
        found = await run(fake, concurrency=4, num_warmups=4)
    assert [record.outcome for record in found.records] == [Outcome.COMPLETED] * 20
    assert gauge.peak == 4
    assert gauge.seen == 24
    posts = [request.json["prompt"] for request in fake.requests if request.method == "POST"]
    assert len({tuple(prompt) for prompt in posts}) == 24  # warm-up prompts are others
    assert all(62 <= token < 938 for prompt in posts for token in prompt)  # the server's vocabulary has 1000
    assert found.duration_s >= max(record.end_s for record in found.records) - found.started_s
    assert found.client_cpu_s > 0


@async_test
async def test_open_loop_sends_when_due_and_not_before():
    async with fake_server() as fake:
        found = await run(fake, concurrency=None, rate=200.0, num_warmups=0)
    dues = [record.due_s - found.started_s for record in found.records]
    assert dues == sorted(dues)
    assert dues[-1] == pytest.approx(20 / 200)
    assert all(record.start_s >= record.due_s for record in found.records)
    assert all(record.completed for record in found.records)


@async_test
async def test_open_loop_holds_back_what_would_exceed_the_limit():
    gauge = Gauge(release_at=3)
    async with fake_server(gauge) as fake:
        found = await run(fake, concurrency=3, rate=1e6, num_warmups=0)
    assert gauge.peak == 3
    assert len(found.records) == 20
    first_end_s = min(record.end_s for record in found.records)
    assert all(record.start_s >= first_end_s > record.due_s for record in found.records[3:])  # late, and on record


@async_test
async def test_refused_users_come_again_when_told():
    async def refuse_first(request, reply):
        posts.append(request)
        if len(posts) == 1:
            await reply.json({"error": {"message": "full"}}, 503, "Retry-After: 0.1\r\n")
        else:
            await completion(request, reply)

    posts: list = []
    async with fake_server(refuse_first) as fake:
        found = await run(fake, concurrency=1, num_prompts=3, num_warmups=0)
    refused, *others = found.records
    assert (refused.outcome, refused.retry_after_s) == (Outcome.REFUSED, 0.1)
    assert [record.outcome for record in others] == [Outcome.COMPLETED] * 2
    assert others[0].start_s - refused.end_s >= 0.1
    assert others[1].start_s - others[0].end_s < 0.1


@async_test
async def test_failing_warm_up_stops_before_the_run():
    async with fake_server(lambda request, reply: reply.json({"error": {"message": "no such token"}}, 400)) as fake:
        with pytest.raises(ConfigError, match=r"warm-up request failed \(http_error\): HTTP 400: no such token"):
            await run(fake, concurrency=4, num_warmups=8)
        assert sum(request.method == "POST" for request in fake.requests) <= 4
        found = await run(fake, concurrency=2, num_warmups=0)
    assert {record.outcome for record in found.records} == {Outcome.HTTP_ERROR}


@pytest.mark.parametrize("load", [{"concurrency": 2}, {"concurrency": None, "rate": 1e6}])
@async_test
async def test_stopping_returns_what_was_measured(load):
    gauge = Gauge(release_at=NEVER)
    stop = asyncio.Event()
    async with fake_server(gauge) as fake:
        running = asyncio.create_task(run(fake, stop, num_warmups=0, **load))
        await asyncio.wait_for(gauge.arrived.wait(), 5)
        stop.set()
        found = await asyncio.wait_for(running, 5)
    assert found.interrupted
    assert found.records
    assert {record.outcome for record in found.records} == {Outcome.INTERRUPTED}


@async_test
async def test_stopping_during_warm_up_measures_nothing():
    gauge = Gauge(release_at=NEVER)
    stop = asyncio.Event()
    async with fake_server(gauge) as fake:
        running = asyncio.create_task(run(fake, stop))
        await asyncio.wait_for(gauge.arrived.wait(), 5)
        stop.set()
        with pytest.raises(StoppedError):
            await asyncio.wait_for(running, 5)


@async_test
async def test_nothing_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    async with fake_server() as fake:
        await run(fake, concurrency=4)
        async with asyncio.timeout(5):
            while fake.num_open:
                await asyncio.sleep(0.001)
    assert len(os.listdir("/proc/self/fd")) == before


@async_test
async def test_our_own_gateway_with_token_ids_and_chat():
    async with served_gateway() as rig:
        found = await run(rig, concurrency=4, num_prompts=12, vocab_size=256, output_len=5)
        assert [record.error for record in found.records if record.failed] == []
        assert {record.num_output_tokens for record in found.records} == {5}
        assert {record.num_prompt_tokens for record in found.records} == {8}
        assert found.server.topology == "1A1F"
        assert found.server.num_workers == 2
        found = await run(rig, concurrency=2, num_prompts=4, endpoint="chat", output_len=5)
        assert [record.error for record in found.records if record.failed] == []
        assert {record.num_output_tokens for record in found.records} == {5}


@async_test
async def test_limits_are_refused_before_anything_is_sent(monkeypatch):
    async with fake_server() as fake:
        monkeypatch.setattr(runner, "raise_open_files", lambda: 140)
        with pytest.raises(ConfigError, match="with 20 connections needs 148 open files, the limit is 140: raise"):
            await run(fake, concurrency=20)
        monkeypatch.setattr(runner, "raise_open_files", lambda: 148)
        await run(fake, concurrency=1000)  # no more connections than requests
        num_requests = len(fake.requests)
        monkeypatch.setattr(load_loop, "MAX_BODIES_BYTES", 1000)
        with pytest.raises(ConfigError, match="lower --num-prompts or --input-len"):
            await run(fake)
        assert [request.method for request in fake.requests[num_requests:]] == ["GET"] * 3


def on_fake_server(script, test):
    """`test(url)` in a thread, while the fake serves in this one: the command line runs a loop of its own."""

    @async_test
    async def serve():
        async with fake_server(script, cluster={"topology": "2A1F"}) as fake:
            await asyncio.to_thread(test, fake.url)

    serve()


def command(url, flags, *more):
    return [sys.executable, "-m", "afd", "bench", "--url", url, *flags.split(), *more]


def call(url, flags, *more):
    """(exit code, stdout, stderr) of a process of its own, where signals and event loops are as they are for users."""
    done = subprocess.run(command(url, flags, *more), capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout, done.stderr


def test_json_has_vllms_keys_and_ours(tmp_path):
    path = tmp_path / "result.json"
    flags = "--concurrency 4 --num-prompts 12 --input-len 8 --output-len 3 --goodput tpot:1000 ttft:5000 --json"

    def test(url):
        saving = ["--save-result", str(path), "--save-detailed", "--metadata", "commit=abc"]
        code, out, err = call(url, flags, *saving)
        assert (code, len(out.splitlines())) == (0, 1), err
        result, saved = json.loads(out), json.loads(path.read_text())
        assert not VLLM_KEYS - result.keys()
        assert not VLLM_DETAILED_KEYS - saved.keys()
        assert not VLLM_DETAILED_KEYS & result.keys()
        assert {key: saved[key] for key in result} == result
        assert (result["completed"], result["failed"], result["commit"], result["model_id"]) == (12, 0, "abc", "m")
        assert (result["total_input_tokens"], result["total_output_tokens"]) == (96, 36)
        assert result["slo_attainment"] == {"tpot": 1.0, "ttft": 1.0, "joint": 1.0, "joint_of_sent": 1.0}
        assert result["request_goodput"] == pytest.approx(12 / result["duration"])
        assert (result["topology"], result["num_workers"]) == ("2A1F", 3)
        assert result["output_throughput_per_worker"] == pytest.approx(result["output_throughput"] / 3)
        assert result["max_concurrent_requests"] <= 4
        assert saved["generated_texts"] == [" 0 1 2"] * 12
        assert [len(gaps) for gaps in saved["itls"]] == [2] * 12
        assert "12/12 done" in err

    on_fake_server(completion, test)


def test_table_counts_refusals_apart_from_failures():
    async def script(request, reply):
        kind = request.json["prompt"][0] % 3
        if kind == 0:
            await completion(request, reply)
        elif kind == 1:
            await reply.json({"error": {"message": "full"}}, 503, "Retry-After: 0\r\n")
        else:
            await reply.json({"error": {"message": "boom"}}, 500)

    def test(url):
        flags = "--num-warmups 0 --num-prompts 60 --input-len 4 --output-len 3 --goodput ttft:9000 --quiet"
        code, out, err = call(url, flags)
        assert (code, err) == (1, "")
        rows = dict(line.rsplit(":", 1) for line in out.splitlines() if line.count(":") == 1)
        counts = [int(rows[key]) for key in ("Successful requests", "Failed requests", "  of these refused (503, 429)")]
        assert counts[0] + counts[1] == 60
        assert 0 < counts[2] < counts[1]
        assert int(rows["  refused with Retry-After"]) == counts[2]
        assert float(rows["All goals (%)"]) == 100.0
        assert float(rows["All goals, of all requests sent (%)"]) == pytest.approx(counts[0] / 60 * 100, abs=0.01)
        assert f"{counts[1] - counts[2]} x http_error: HTTP 500: boom" in out
        assert f"{counts[2]} x refused: HTTP 503: full" in out
        for title in ("Time to First Token", "Inter-token Latency", "End-to-end Latency", "SLO Attainment"):
            assert title in out

    on_fake_server(script, test)


def test_only_refusals_beside_completions_is_a_success():
    async def script(request, reply):
        if request.json["prompt"][0] % 2:
            await reply.json({"error": {"message": "full"}}, 503)
        else:
            await completion(request, reply)

    def test(url):
        code, out, _ = call(url, "--num-warmups 0 --num-prompts 30 --rate 1000 --json --quiet")
        result = json.loads(out)
        assert code == 0
        assert result["refused"] == result["failed"] > 0
        assert result["outcomes"] == {"completed": result["completed"], "refused": result["refused"]}
        assert "p99_client_queue_time_ms" in result

    on_fake_server(script, test)


def test_ctrl_c_reports_what_was_measured():
    async def script(request, reply):
        if len(fake_requests) < 3:
            fake_requests.append(request)
            await completion(request, reply)
        else:
            stuck.append(request)
            await asyncio.Event().wait()

    fake_requests: list = []
    stuck: list = []

    def test(url):
        flags = "--num-warmups 1 --concurrency 2 --num-prompts 50 --json --quiet"
        with subprocess.Popen(command(url, flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 20
            while len(stuck) < 2 and time.monotonic() < deadline:
                time.sleep(0.005)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=10)
        result = json.loads(out)
        assert (process.returncode, err) == (130, b"")
        assert (result["completed"], result["failed"], result["interrupted"]) == (2, 0, 2)
        assert result["run_interrupted"]

    on_fake_server(script, test)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--url", "ftp://x"], "not of the form"),
        (["--goodput", "speed:1"], "METRIC:MILLISECONDS"),
        (["--burstiness", "2"], "pass --rate"),
        (["--save-detailed"], "needs --save-result"),
        (["--save-result", "/nonexistent/x.json"], "No such file"),
        (["--metadata", "x"], "KEY=VALUE"),
        (["--url", "http://127.0.0.1:1"], "is the server running"),
    ],
)
def test_what_cannot_start_is_one_line_and_exit_code_2(args, reason):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(["bench", "--quiet", *args])
    assert code == 2
    assert err.getvalue().startswith("afd: error: ")
    assert reason in err.getvalue()
    assert len(err.getvalue().splitlines()) == 1


@pytest.mark.parametrize(
    "args", [["--concurrency", "0"], ["--rate", "-1"], ["--range-ratio", "1"], ["--percentiles", "101"]]
)
def test_flags_out_of_range_are_usage_errors(args, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *args])
    assert caught.value.code == 2
    assert args[0] in capsys.readouterr().err
