"""Benchmarks: what is found, how it is timed, what follows from the samples, what is written, what is drawn."""

import dataclasses
import json
import time
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from onepass.bench import environment, peak, plot, registry, report, run, timing
from onepass.commands import bench
from onepass.core import cpu_library

SETTINGS = run.Settings(num_threads=1, repeats=3, sample_seconds=0.001)


def toy(ours=0.0, theirs=0.0, error=0.1, **fields):
    """A case whose providers sleep."""
    providers = {"ours": lambda: time.sleep(ours), "peer": lambda: time.sleep(theirs)}
    prepared = registry.Prepared(providers, lambda: {"ours": error, "peer": 0.1, "sdpa": 0.1})
    return registry.Case("toy", {"n": 1}, "float32", lambda: prepared, **fields)


def toy_benchmark(*cases, name="toy", **fields):
    return registry.Benchmark(name, (registry.Group("group", "Toy", cases, **fields),))


def test_attention_has_every_group():
    groups = [group.name for group in registry.find("attention").groups]
    assert groups == [
        "forward-fp32",
        "forward-bf16",
        "forward-backward-fp32",
        "forward-backward-bf16",
        "decode",
        "forward-fp32-avx2",
        "scaling",
        "call",
        "options-forward-fp32",
        "options-forward-bf16",
        "options-forward-backward-fp32",
        "options-forward-backward-bf16",
        "cuda-forward",
        "cuda-backward",
        "cuda-options-forward",
        "cuda-options-backward",
        "cuda-bias-gradient",
        "cuda-decode",
        "cuda-caches",
        "cuda-host",
        "cuda-first-call",
    ]
    for name in groups[:4]:
        assert len(registry.find("attention").group(name).cases) == 20


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match=r"no benchmark 'atention'; there are: attention, .*generation"):
        registry.find("atention")
    with pytest.raises(ValueError, match=r"no group 'forward'; it has: forward-fp32, "):
        registry.find("attention").group("forward")


def test_interleaved_order_rotates_and_counts():
    order = []
    names = ("a", "b", "c")
    samples = timing.interleaved(
        {name: lambda name=name: order.append(name) for name in names}, 4, timing.WallClock(1e-9)
    )
    assert all(len(sample.seconds) == 4 and sample.calls == 1 for sample in samples.values())
    assert order[-12:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]


def test_samples_last_as_long_as_asked():
    calls = timing.calls_for(lambda: time.sleep(0.001), 0.02)
    assert 5 <= calls <= 20


def test_ratio_is_taken_within_each_repeat():
    """A machine that slows down for a while does not change the ratio."""
    samples = {
        "ours": timing.Samples(1, [1.0, 10.0, 1.0]),
        "slow": timing.Samples(1, [9.0, 90.0, 9.0]),
        "fast": timing.Samples(1, [3.0, 30.0, 3.0]),
    }
    found = run.summarise(toy(flops=4e9, items=8), samples, [8.0, 8.0, 2.0])
    assert found["best_peer"] == "fast"
    assert found["ratios"]["fast"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert found["gflops"]["ours"] == pytest.approx(4.0)
    assert found["percent_of_peak"]["ours"] == pytest.approx(50.0)
    assert found["items_per_second"]["fast"] == pytest.approx(8 / 3)


@pytest.mark.parametrize("error", [1.01, float("inf"), float("nan")])
def test_wrong_numbers_are_not_timed(error):
    with pytest.raises(run.NumericsError, match=r"group, toy: ours is (1\.01|inf|nan) error budgets from fp64"):
        run.run_group(toy_benchmark(toy(error=error)).groups[0], SETTINGS, lambda text: None)


def test_groups_are_kept_when_another_is_measured_again(tmp_path):
    out = tmp_path / "results" / "toy.json"
    first = registry.Group("first", "First", (toy(quick=True),))
    second = registry.Group("second", "Second", (toy(),))
    benchmark = registry.Benchmark("toy", (first, second))
    run.run(benchmark, SETTINGS, out, ["second"])
    before = json.loads(out.read_text())["groups"]["second"]
    run.run(benchmark, SETTINGS, out, ["first"])
    groups = json.loads(out.read_text())["groups"]
    assert list(groups) == ["first", "second"]
    assert groups["second"] == before
    facts = groups["first"]["environment"]
    assert {"cpu", "isa", "threads", "clocks", "torch", "commit", "date", "load_average"} <= facts.keys()
    assert len(groups["first"]["cases"][0]["samples"]["ours"]["seconds"]) == 3


def test_another_benchmarks_file_and_rubbish_are_refused(tmp_path):
    out = tmp_path / "toy.json"
    run.run(toy_benchmark(toy()), SETTINGS, out)
    with pytest.raises(ValueError, match="holds results of 'toy', not of 'other'"):
        run.run(toy_benchmark(toy(), name="other"), SETTINGS, out)
    for text in ("{", "[]", '{"benchmark": "toy"}'):
        out.write_text(text)
        with pytest.raises(ValueError, match=r"toy\.json"):
            run.load(out)


@pytest.mark.parametrize(
    ("bars", "met"),
    [
        ({"ratio": 2.0}, True),
        ({"ratio": 2.03}, False),  # the median, 2.0, may be 0.02 below the bar
        ({"ratio": 2.019}, True),
        ({"seconds": 1.0}, True),
        ({"seconds": 0.9}, False),
        ({"percent_of_peak": 50.0}, True),
        ({"percent_of_peak": 51.0}, False),
        ({"error_to_sdpa": 2.0}, True),
        ({"error_to_sdpa": 1.9}, False),
    ],
)
def test_bars(bars, met):
    case = toy(flops=1e9, bars=bars)
    samples = {"ours": timing.Samples(1, [1.0] * 3), "peer": timing.Samples(1, [2.0] * 3)}
    row = {
        "name": case.name,
        "bars": bars,
        "samples": {"ours": {}, "peer": {}},
        "error_in_budgets": {"ours": 0.2, "sdpa": 0.1},
        "summary": run.summarise(case, samples, [2.0]),
    }
    (bar,) = report.case_bars("group", row)
    assert bar.met is met


@pytest.mark.parametrize(
    ("bars", "met"),
    [
        ({"gbps": 4.0}, True),
        ({"gbps": 4.1}, False),
        ({"percent_of_bandwidth": 50.0}, True),
        ({"percent_of_bandwidth": 50.1}, False),
        ({"ratio to peer": 2.02}, True),
        ({"ratio to peer": 2.03}, False),
        ({"ratio to nobody": 1.0}, None),
        ({"peak_bytes": 1000.0}, True),
        ({"peak_bytes": 999.0}, False),
    ],
)
def test_bars_of_memory(bars, met):
    case = toy(min_bytes=4e9, bars=bars)
    samples = {"ours": timing.Samples(1, [1.0] * 3), "peer": timing.Samples(1, [2.0] * 3)}
    row = {
        "name": case.name,
        "bars": bars,
        "samples": {"ours": {}, "peer": {}},
        "peak_bytes": {"ours": 1000, "peer": 2000},
        "summary": run.summarise(case, samples, roofline={"read": 9.0, "copy": 8.0}),
    }
    (bar,) = report.case_bars("group", row)
    assert bar.met is met


def test_unknown_bars_are_told():
    with pytest.raises(ValueError, match=r"there is no bar 'speed'; expected one of ratio, .*ratio to PEER"):
        list(report.case_bars("group", {"name": "toy", "bars": {"speed": 1.0}, "samples": {"ours": {}}}))


def test_absent_peers_are_in_the_result_and_in_the_table(tmp_path):
    def errors():
        return {"ours": 0.1, "peer": 0.1, "wrong": 500.0}

    providers = {name: lambda: None for name in ("ours", "peer", "wrong", "broken")}
    prepared = registry.Prepared(providers, errors, absent={"quack": "quack is not installed", "broken": "it broke"})
    case = registry.Case("toy", {}, "float32", lambda: prepared, bars={"ratio to quack": 1.0})
    result = run.run(toy_benchmark(case, toy()), SETTINGS, tmp_path / "toy.json")
    row = result["groups"]["group"]["cases"][0]
    assert list(row["samples"]) == ["ours", "peer"]
    assert row["absent"] == {
        "quack": "quack is not installed",
        "broken": "it broke",
        "wrong": "its numbers are wrong: 500 error budgets from fp64, not 100",
    }
    (table,) = report.tables(result)
    assert "without quack: quack is not installed (toy)" in str(table.caption)
    (line,) = report.verdict(result)
    assert "not judged, the peer is absent: group, toy: ratio to quack" in line.plain
    plot.draw(result, tmp_path, "toy")


def test_bytes_are_counted_against_the_roofline(tmp_path):
    result = run.run(toy_benchmark(toy(ours=0.001, min_bytes=1e6)), SETTINGS, tmp_path / "toy.json")
    group = result["groups"]["group"]
    assert group["roofline"]["copy"] > 0.1
    summary = group["cases"][0]["summary"]
    assert summary["percent_of_bandwidth"]["ours"] == pytest.approx(
        100 * summary["gbps"]["ours"] / group["roofline"]["copy"]
    )
    (picture,) = plot.draw(result, tmp_path, "toy")
    text = "".join(ElementTree.parse(picture).getroot().itertext())
    assert "GB/s" in text
    assert "% of measured copy bandwidth" in text


def test_a_group_with_wrong_numbers_does_not_stop_the_next(tmp_path):
    groups = (registry.Group("bad", "Bad", (toy(error=9.0),)), registry.Group("good", "Good", (toy(),)))
    with pytest.raises(run.NumericsError, match="bad, toy: ours is 9 error budgets"):
        run.run(registry.Benchmark("toy", groups), SETTINGS, tmp_path / "toy.json")
    assert list(run.load(tmp_path / "toy.json")["groups"]) == ["good"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_groups_of_a_gpu_need_one(tmp_path):
    benchmark = registry.find("softmax")
    with pytest.raises(ValueError, match="there is no GPU here for softmax: forward"):
        run.run(benchmark, SETTINGS, tmp_path / "out.json", ["forward"])
    with pytest.raises(ValueError, match="sees no GPU here"):
        bench.chosen_device("cuda")


def test_what_nvidia_smi_tells():
    found = environment.parse_gpu_clocks("580.95.05, 1980, 1980, 3201, 3201, 118.53, 700.00, [N/A]\n")
    assert found["driver"] == "580.95.05"
    assert found["sm_mhz"] == found["max_sm_mhz"] == 1980.0
    assert found["celsius"] == "[N/A]"


def test_results_of_a_gpu_name_it(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H200", total_memory=1, multi_processor_count=132, major=9, minor=0, uuid="none"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: properties.name)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    facts = environment.facts(2, "cuda")
    assert facts["device"] == "nvidia-h200"
    assert facts["multiprocessors"] == 132
    assert "isa" not in facts  # the C++ library need not be there
    assert report.machine(facts).startswith("NVIDIA H200, torch ")


def test_devices_are_chosen():
    assert bench._device_of(["attention"], (), None) == "cpu"
    assert bench._device_of(["norm"], ("cpu-forward-fresh",), None) == "cpu"
    assert bench._device_of(["norm"], (), "cpu") == "cpu"


def test_all_benchmarks_in_one_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = (registry.Group("wrong", "Wrong", (toy(error=9.0),)), registry.Group("right", "Right", (toy(),)))

    def fails():
        raise RuntimeError("out of memory")

    broken = toy_benchmark(registry.Case("toy", {}, "float32", fails), name="broken")
    good = toy_benchmark(toy(), name="good")
    benchmarks = {"bad": registry.Benchmark("bad", wrong), "broken": broken, "good": good}
    monkeypatch.setattr(registry, "modules", lambda: dict.fromkeys(benchmarks, ""))
    monkeypatch.setattr(registry, "find", benchmarks.__getitem__)
    done = CliRunner().invoke(bench.command, ["all", "--device", "cpu", "--repeats", "3"])
    assert done.exit_code == 1
    assert "bad: wrong, toy: ours is 9 error budgets" in done.output
    assert "broken: out of memory" in done.output
    assert "Right (right)" in done.output
    assert sorted(path.name for path in tmp_path.glob("onepass-bench/results/*/*")) == ["bad.json", "good.json"]
    listed = CliRunner().invoke(bench.command, [])
    assert "good (cpu): group" in listed.output


def test_geometric_mean_and_rate_bars():
    result = {"groups": {"group": run.run_group(toy_benchmark(toy(items=1)).groups[0], SETTINGS, lambda text: None)}}
    group = result["groups"]["group"]
    group |= {"mean_bar": 0.1, "geometric_mean": 0.05, "last_rate_bar": 1.5}
    found = {bar.what: bar.met for bar in report.bars(result)}
    assert found == {"geometric mean of the ratios": False, "rate kept since the first case": False}
    group["settings"]["quick"] = True
    assert report.bars(result) == []


def test_a_group_with_settings_runs_in_its_own_process(tmp_path):
    """The instruction set is forced there and not here."""
    here, oldest = cpu_library.isa(), cpu_library.isas()[0]
    forced = dataclasses.replace(registry.find("attention").group("call"), settings={"ONEPASS_CPU_ISA": oldest})
    result = run.run(registry.Benchmark("attention", (forced,)), SETTINGS, tmp_path / "out.json")
    assert result["groups"]["call"]["environment"]["isa"] == oldest
    assert cpu_library.isa() == here


def test_a_process_that_fails_is_told(tmp_path):
    forced = dataclasses.replace(registry.find("attention").group("call"), settings={"ONEPASS_CPU_ISA": "avx1024"})
    with pytest.raises(RuntimeError, match=r"measuring call in its own process failed"):
        run.run(registry.Benchmark("attention", (forced,)), SETTINGS, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_pictures_come_from_the_json_alone(tmp_path):
    out = tmp_path / "toy.json"
    cases = [toy(flops=1e6, items=2, bars={"ratio": 1.0}), toy(flops=2e6, items=2)]
    run.run(toy_benchmark(*cases), SETTINGS, out)
    first, second = (plot.draw(run.load(out), tmp_path / name, "toy") for name in ("one", "two"))
    assert [path.name for path in first] == ["toy-group.svg"]
    assert first[0].read_bytes() == second[0].read_bytes()
    text = "".join(ElementTree.parse(first[0]).getroot().itertext())
    for words in ("time, ms", "GFLOP/s", "% of measured FMA peak", "best peer's time / ours", "Toy"):
        assert words in text
    (picture,) = plot.draw(run.load(out), tmp_path, "toy", ".png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_memory_of_a_call_is_measured():
    held = 64 * 2**20
    assert run.extra_memory(lambda: torch.zeros(held, dtype=torch.uint8).sum()) >= held * 0.9
    assert run.extra_memory(lambda: torch.zeros(held, dtype=torch.uint8)) < held * 0.1


def test_fma_peak():
    single = peak.fma_peak(torch.float32, 1, 0.02)
    assert 0.5 < single < 2000.0
    assert peak.fma_peak(torch.bfloat16, 1, 0.02) > 0.5 * single
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        peak.fma_peak(torch.float64, 1)
    with pytest.raises(ValueError, match="num_threads is 0"):
        peak.fma_peak(torch.float32, 0)


def test_threads_are_restored():
    before = torch.get_num_threads()
    with run.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="num_threads is 0"):
        run.threads(0)
