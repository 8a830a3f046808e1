"""Bandwidth: what is measured, how a roofline follows, the Triton kernels, the command's file and picture."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from onepass.bench import bandwidth, plot, report
from onepass.commands import bench

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KERNELS = """
import functools, operator
import torch
from onepass.bench import bandwidth_triton as kernels

x = torch.randint(-(2**31), 2**31, (1 << 14,), dtype=torch.int32)
for blocks in (1, 3, 8, 20):
    results, y = torch.zeros(blocks, dtype=torch.int32), torch.zeros_like(x)
    kernels.read(x, results, blocks, 1024)
    together = functools.reduce(operator.xor, results.tolist())
    assert together == functools.reduce(operator.xor, x.tolist()), blocks
    kernels.copy(x, y, blocks, 1024)
    assert torch.equal(x, y), blocks
"""


def test_memory_bandwidth():
    assert 0.1 < bandwidth.memory_bandwidth("copy", 1 << 20, 1, seconds=0.01) < 10000
    with pytest.raises(ValueError, match="access is 'write'"):
        bandwidth.memory_bandwidth("write", 1 << 20, 1)


def test_a_roofline_is_the_best_of_each_kind(monkeypatch):
    rates = {"read": 30.0, "copy": 20.0, "stream": 25.0}
    monkeypatch.setattr(bandwidth, "memory_bandwidth", lambda access, *rest: rates[access])
    assert bandwidth.roofline("cpu", 2) == {"read": 30.0, "copy": 25.0}


def test_a_sweep_measures_every_combination():
    sweep = bandwidth.Sweep("cpu", ("read", "stream"), (1 << 16, 1 << 18), (1,), (1 << 12, 1 << 14))
    found = bandwidth.points(sweep, seconds=1e-4)
    assert len(found) == 8
    assert {point["size"] for point in found} == {1 << 16, 1 << 18}
    assert all(point["gbps"] > 0 for point in found)
    assert set(bandwidth.best(found)) == {"read", "copy"}


@pytest.mark.parametrize(
    ("sizes", "blocks", "block_sizes", "device"),
    [
        ((64,), (1,), (128,), "cpu"),
        ((), (1,), (128,), "cpu"),
        ((4096,), (0,), (128,), "cpu"),
        ((1 << 20,), (1,), (3000,), "cuda"),
    ],
)
def test_impossible_sweeps_are_refused(sizes, blocks, block_sizes, device):
    with pytest.raises(ValueError, match="must be"):
        bandwidth.Sweep(device, ("read",), sizes, blocks, block_sizes)


def test_the_command_writes_draws_and_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--device", "cpu", "--threads", "1", "--size", "65536", "--size", "262144", "--block-size", "4096"]
    done = CliRunner().invoke(bench.command, ["bandwidth", *options, "--plot"])
    assert done.exit_code == 0, done.output
    (out,) = tmp_path.glob("onepass-bench/results/*/bandwidth.json")
    result = json.loads(out.read_text())
    assert {"gbps", "size", "blocks", "block_size", "access"} == result["points"][0].keys()
    assert {"cpu", "threads", "commit"} <= result["environment"].keys()
    assert list(tmp_path.glob("onepass-bench/plots/*/bandwidth.svg"))
    again = CliRunner().invoke(bench.command, ["bandwidth", "--device", "cpu", "--no-run", "--out", str(out)])
    assert again.exit_code == 0, again.output
    assert "256.0 KiB" in again.output or "0.2 MiB" in again.output
    missing = CliRunner().invoke(bench.command, ["bandwidth", "--device", "cpu", "--no-run", "--out", "none.json"])
    assert "there is no result none.json yet" in str(missing.exception)


def test_tables_and_pictures_come_from_the_result_alone():
    points = [
        {"access": access, "size": size, "blocks": blocks, "block_size": 4096, "gbps": 1.0 * blocks}
        for access in ("read", "copy")
        for size in (1 << 20, 1 << 30)
        for blocks in (132, 264)
    ]
    facts = {"gpu": "NVIDIA H200", "torch": "2.11", "versions": {"triton": "3.6.0"}}
    result = {"environment": facts, "sweep": {"accesses": ["read", "copy"]}, "points": points}
    assert report.bandwidth_table(result).row_count == 4
    assert len(plot.draw_bandwidth(result).axes) == 3


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@needs_gpu
def test_the_roofline_of_a_gpu():
    found = bandwidth.roofline("cuda")
    assert 100 < found["copy"] < 20000
    assert found["copy"] < 1.2 * found["read"]
