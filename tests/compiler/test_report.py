"""The report as table, JSON and HTML; adding from many threads."""

from __future__ import annotations

import copy
import json
import threading

import torch
from torch import nn

import meshwright as mw
from meshwright.compiler.report import CandidateRow, KernelReport, Report


def filled() -> Report:
    report = Report("Net")
    report.candidate("fuse", CandidateRow("gelu", "kept", key="a", count=3, predicted_before_s=2e-6,
                                          predicted_after_s=1e-6, measured_before_s=3e-6, measured_after_s=1e-6))
    report.candidate("fuse", CandidateRow("softmax", "dropped", "not faster"))
    report.refused("fuse", "a <b> & c", "node_1")
    report.region("print can't be traced", "/home/me/model.py", 12)
    report.region("print can't be traced", "/home/me/model.py", 12)
    report.add_seconds("dynamo", 1.5)
    report.add_kernel(KernelReport("fused_gelu_0", "c++", "void f(); // <source>", "kernel fused_gelu_0()"))
    graph = report.add_graph("inference 0", "inference", 12)
    graph.kernel_bytes, graph.aten_bytes = 300, 100
    return report


def test_sums_run_over_kept_candidates_times_count() -> None:
    entry = filled().passes["fuse"]
    assert (entry.matched, entry.rewritten, len(entry.dropped), len(entry.refused)) == (4, 3, 1, 1)
    assert abs(entry.predicted_s - 3e-6) < 1e-12
    assert abs(entry.measured_s - 6e-6) < 1e-12


def test_text_says_what_matters() -> None:
    text = str(filled())
    for part in ("Net: 1 graph, 1 emitted kernel", "75% of the bytes", "1 graph break", "not faster",
                 "/home/me/model.py:12",
                 "print can't be traced", "dynamo", "1.50", "6 µs", "3 µs"):
        assert part in text, f"{part!r} is missing in\n{text}"


def test_json_holds_everything_and_html_is_escaped() -> None:
    report = filled()
    data = json.loads(json.dumps(report.as_dict()))
    assert data["passes"][0]["refused"] == [{"reason": "a <b> & c", "where": "node_1"}]
    assert data["coverage"] == 0.75 and len(data["regions"]) == 1
    page = report.to_html()
    assert "a &lt;b&gt; &amp; c" in page and "<b>" not in page
    assert "// &lt;source&gt;" in page and "<script" not in page


def test_an_empty_report_prints() -> None:
    assert "nothing is compiled yet" in str(Report("empty"))
    assert Report("empty").coverage is None


def test_threads_add_without_loss() -> None:
    report = Report()

    def add() -> None:
        for i in range(200):
            report.matched("fuse")
            report.refused("fuse", "reason", i)
            report.add_seconds("aot", 1.0)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert report.passes["fuse"].matched == len(report.passes["fuse"].refused) == 1600
    assert report.phases["aot"] == 1600.0


def test_copies_are_independent() -> None:
    report = filled()
    twin = copy.deepcopy(report)
    twin.matched("fuse")
    assert report.passes["fuse"].matched == 4 and twin.passes["fuse"].matched == 5


def test_a_compilation_fills_it(eager_engine: None) -> None:
    report = mw.compile(nn.Linear(4, 4).eval(), torch.randn(2, 4)).report
    assert report.phases["dynamo"] > 0 and report.phases["aot"] > 0
    assert [g.kind for g in report.graphs] == ["inference"]
