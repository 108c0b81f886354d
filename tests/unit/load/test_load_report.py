"""Report: every key is documented, runs without a single answer still report, progress fits its stream."""

import io
import re
from array import array
from pathlib import Path

from afd.load.http1 import ServerUrl
from afd.load.metrics import Goals, summarise
from afd.load.progress import Progress, Status
from afd.load.record import Outcome, RequestRecord
from afd.load.report import detailed_json, failure_reasons, render_table, result_json
from afd.load.runner import BenchRun, BenchSettings
from afd.load.server_info import ServerInfo

DOC = Path(__file__).parents[3] / "docs" / "bench-client.md"


def report(records, *, goals=(), num_workers=None, percentiles=(50.0, 99.9), topology=None, **fields):
    settings = BenchSettings(ServerUrl("h", 1, False, ""), **fields)
    run = BenchRun(ServerInfo("m", topology=topology), records, 0.0, 2.0, 0.5, False)
    parsed = Goals.parse(goals)
    concurrency = settings.concurrency if settings.rate is None else None
    summary = summarise(records, duration_s=2.0, percentiles=percentiles, goals=parsed, concurrency=concurrency)
    result = result_json(run, summary, settings, num_workers=num_workers, goals=parsed, label="l", metadata={"k": "v"})
    return result, render_table(result, summary, failure_reasons(records))


def completed(idx=0, start=0.0):
    return RequestRecord(
        idx, 4, start, start, start + 1.5, array("d", [start + 0.5, start + 1.0, start + 1.5]), 3, 2, Outcome.COMPLETED
    )


def refused():
    return RequestRecord(1, 4, 0.0, 0.0, 0.1, outcome=Outcome.REFUSED, status=503, error="full", retry_after_s=1.0)


def test_every_key_is_documented():
    documented = set(re.findall(r"`(\w+)`", DOC.read_text(encoding="utf-8")))
    result, _ = report([completed(), refused()], goals=["ttft:1"], num_workers=3, rate=1.0)
    result.pop("k")
    statistics = re.compile(r"(mean|median|std|max|p50|p99\.9)_(ttft|tpot|itl|e2el|client_queue_time|refusal)_ms")
    assert {key for key in result if not statistics.fullmatch(key)} <= documented
    assert detailed_json([completed()]).keys() <= documented
    assert sum(bool(statistics.fullmatch(key)) for key in result) == 6 * 6


def test_figures_of_a_small_run():
    result, table = report([completed(), refused()], num_workers=2, topology="3A1F")
    assert result["p99.9_ttft_ms"] == result["max_ttft_ms"] == 500.0
    assert result["output_throughput"] == 1.5
    assert result["output_throughput_per_worker"] == 0.75  # the flag overrides what the server says
    assert result["client_cpu_us_per_chunk"] == 0.5 / 3 * 1e6
    assert (result["request_rate"], result["max_concurrency"], result["k"]) == ("inf", 1, "v")
    assert "P99.9 TTFT (ms):" in table
    assert "1 x refused: full" in table
    assert report([completed()], topology="3A1F")[0]["num_workers"] == 4
    assert report([completed()])[0]["output_throughput_per_worker"] is None


def test_a_run_without_any_answer_reports_too():
    for records in ([], [refused()], [RequestRecord(0, 4, outcome=Outcome.INTERRUPTED)]):
        result, table = report(records, goals=["tpot:1"], rate=1.0, concurrency=None)
        assert result["output_throughput"] == 0.0
        assert result["mean_tpot_ms"] == 0.0
        assert result["max_concurrency"] is None
        assert "Successful requests:                     0" in table


def test_busy_client_is_pointed_out():
    settings = BenchSettings(ServerUrl("h", 1, False, ""))
    summary = summarise([completed()], duration_s=2.0, percentiles=(), goals=Goals(), concurrency=1)
    for cpu_s, expected in ((1.9, True), (1.0, False)):
        run = BenchRun(ServerInfo("m"), [completed()], 0.0, 2.0, cpu_s, False)
        result = result_json(run, summary, settings, num_workers=None, goals=Goals(), label="", metadata={})
        assert ("nearly filled a core" in render_table(result, summary, [])) is expected


def test_detailed_arrays_are_in_the_order_of_the_prompts():
    detailed = detailed_json([completed(2, 5.0), completed(0, 6.0), completed(1, 7.0)])
    assert detailed["start_times"] == [6.0, 7.0, 5.0]
    assert detailed["itls"] == [[0.5, 0.5]] * 3


def test_failure_reasons_are_the_commonest():
    records = [RequestRecord(0, 0, outcome=Outcome.HTTP_ERROR, error=f"e{n}") for n in range(7) for _ in range(n + 1)]
    reasons = failure_reasons([*records, completed()], limit=2)
    assert reasons == ["7 x http_error: e6", "6 x http_error: e5", "and 5 other reasons"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


STATUS = Status(num_total=10, num_done=5, num_failed=1, num_running=2, num_tokens=300, elapsed_s=2.0)


def test_progress_on_a_terminal_is_one_line_that_goes_away():
    stream = Terminal()
    progress = Progress(stream)
    progress.show(STATUS)
    assert "\n" not in stream.getvalue()
    assert "[############............] 5/10 done, 2 running, 1 failed, 150 tok/s, 2 s" in stream.getvalue()
    progress.show(STATUS, last=True)
    assert stream.getvalue().endswith("\r\x1b[K")


def test_progress_elsewhere_is_plain_lines():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.note("warming up")
    progress.show(STATUS, last=True)
    assert stream.getvalue() == "warming up\n5/10 done, 2 running, 1 failed, 150 tok/s, 2 s\n"
    assert progress.interval_s > Progress(Terminal()).interval_s
    Progress(None).show(STATUS)  # quiet
