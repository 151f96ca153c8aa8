"""The benchmarks on tiny shapes, and the page and the README table made of the attention benchmark's results."""

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mimo import MiMoConfig
from mimo_kernels.attention import FrameMask

from . import processes

NAMES = (
    "common",
    "attn_peers",
    "attn_bench",
    "attn_configs",
    "lengths_bench",
    "sample_bench",
    "rollout_bench",
    "train_bench",
    "data_pipeline",
    "report",
) + ("system_costs",)
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    """The benchmark scripts, which import one another from their own folder as scripts do."""
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path[:] = path


@pytest.fixture(scope="module")
def results(modules, tmp_path_factory):
    common, attn_bench = modules["common"], modules["attn_bench"]
    shapes = [
        attn_bench.teacher_forcing("tiny", "alike clips", 2, 3, 8, 5, 2, 24),
        attn_bench.ragged("mixed", "ragged clips", 2, (2, 3), 6, (3, 5), 1, 16),
        attn_bench.teacher_forcing("shared", "heads that share keys", 1, 2, 8, 5, 4, 16, kv_heads=2),
        attn_bench.last_frames("asked", "the last frame asks", 2, 3, 4, 1, 1, 16),
        attn_bench.slices("slices", "four intervals", 6, 2, 1, 16),
    ]
    device = torch.device("cpu")
    saved: dict[str, list[int]] = {shape.name: [] for shape in shapes}
    rows = []
    for shape in shapes:
        save = saved[shape.name].append
        rows += attn_bench.bench(shape, device, 1.0, seconds=0.001, save=lambda table, save=save: save(len(table)))
    # Every implementation and direction is on the disk before the next one begins.
    assert all(counts == list(range(1, len(rows) // len(shapes) + 1)) for counts in saved.values())
    limits = {"matmul": "none", "matmul_tflops": 1.0, "copy_gb_per_s": 1.0}
    out = tmp_path_factory.mktemp("results")
    common.write_results(out, "attention", common.machine(device), limits, rows, attn_bench.PLOT)
    return out


def test_every_row_is_checked_and_has_its_figures(results):
    rows = json.loads((results / "attention.json").read_text())["rows"]
    measured = [row for row in rows if "ms" in row]
    for shape in ("tiny", "mixed", "shared", "asked", "slices"):
        names = {row["implementation"] for row in measured if row["shape"] == shape}
        assert {"frame_attention", "FlexAttention, eager", "SDPA, dense mask, packed"} <= names
        varlen = {"varlen, gathered, torch flash", "varlen calls + merge, torch flash"}
        others = varlen | {"frame_attention, atomic backward"}
        assert others <= names if shape != "shared" else not others & names
    for row in measured:
        assert row["error"] <= 1e-5 and row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert 0 < row["useful_tflops"] <= row["executed_tflops"] * 1.0001
        assert row["speedup_of_ours"] == 1 or row["implementation"] != "frame_attention"
    assert all("note" in row for row in rows if "ms" not in row)
    assert (results / "attention.csv").exists() and (results / "attention.png").exists()


def test_a_wrong_peer_is_not_timed(modules, monkeypatch):
    attn_bench, attn_peers = modules["attn_bench"], modules["attn_peers"]
    monkeypatch.setattr(attn_peers.DenseSDPA, "__call__", lambda self, q, k, v: q + k + v)
    shape = attn_bench.block_causal("tiny", "", 1, 2, 4, 1, 8)
    rows = attn_bench.bench(shape, torch.device("cpu"), 1.0, seconds=0.001)
    wrong = [row for row in rows if row["implementation"].startswith("SDPA")]
    assert wrong and all("ms" not in row and "is wrong: rms error" in row["note"] for row in wrong)


def test_page_and_readme_show_what_was_measured(modules, results, tmp_path):
    report = modules["report"]
    loaded = report.load_results(results)
    page = report.page([{"step": "tests", "status": 0, "seconds": 1.0, "last_line": "5 passed"}], loaded, results)
    assert "No GPU" in page and "![attention](attention.png)" in page and "| tests | 0 |" in page
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    report.write_readme(readme, report.readme_table(loaded))
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks -->\n") and text.endswith("<!-- /benchmarks -->\nafter\n")
    assert "old" not in text and all(text.count(f"| {name} |") == 2 for name in ("tiny", "shared", "asked"))
    with pytest.raises(ValueError, match="has no <!-- benchmarks -->"):
        report.write_readme(results / "attention.csv", "table")


def test_shapes_are_handed_on_to_the_one_benchmark_that_is_named(modules, monkeypatch, tmp_path, capsys):
    report, commands = modules["report"], {}
    monkeypatch.setattr(report, "run", lambda name, command, *_: commands.update({name: command}) or {"status": 0})
    monkeypatch.setattr(report, "write_page", lambda *_: [])
    monkeypatch.setattr(report.common, "format_table", lambda *_: "")
    given = ["report.py", "--out", str(tmp_path), "--only", "attn_bench"]
    monkeypatch.setattr(sys, "argv", [*given, "--shapes", "k600-xl", "wan-tf"])
    assert report.main() == 0 and commands["attn_bench"][-3:] == ["--shapes", "k600-xl", "wan-tf"]
    for several in (["--only", "attn_bench", "ops_bench"], ["--only", "tests"], []):
        monkeypatch.setattr(sys, "argv", ["report.py", "--out", str(tmp_path), *several, "--shapes", "k600-xl"])
        with pytest.raises(SystemExit):
            report.main()
        assert "--shapes belongs to one benchmark" in capsys.readouterr().err


def test_changing_lengths_are_measured(modules):
    bench = modules["lengths_bench"]
    shape = bench.Shape("tiny", "", 2, (1, 2), 4, (2, 3), 1, 16, batches=3)
    saved = []
    rows = bench.bench([shape], torch.device("cpu"), lambda rows: saved.append(len(rows)), modules["common"].Budget())
    whats = ["mask", "first call", "new lengths", "known lengths"]
    assert saved == [4, 8] and [row["what"] for row in rows] == 2 * whats
    assert {row["implementation"] for row in rows} == {"frame_attention", "FlexAttention, eager"}
    assert all(0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in rows)


def test_touched_pairs_counts_whole_tiles(modules):
    mask = FrameMask.teacher_forcing([[3, 4, 2]] * 2, [[5, 1, 6]] * 2, window=2)
    dense = mask.to_dense()[:21, :21]
    for rows, keys in ((1, 1), (4, 2), (8, 8), (32, 16)):
        tiles = sum(
            bool(dense[i : i + rows, j : j + keys].any()) for i in range(0, 21, rows) for j in range(0, 21, keys)
        )
        assert modules["attn_peers"].touched_pairs(mask, rows, keys) == 2 * tiles * rows * keys


TINY = {
    "depth": 2,
    "dim": 16,
    "heads": 2,
    "height": 2,
    "width": 2,
    "channels": 4,
    "decoder_layer": 1,
    "decoder_depth": 1,
}
LIMITS = {"matmul_tflops": 1.0, "copy_gb_per_s": 1.0}


def test_sampling_is_measured_for_every_cache(modules):
    sample_bench = modules["sample_bench"]
    network = MiMoConfig(**TINY, parameterization="flow")
    shape = sample_bench.Shape("tiny", network, batch=1, frames=sample_bench.WINDOW + 2, steps=2)
    rows, curves = sample_bench.bench(shape, torch.device("cpu"), LIMITS)
    assert {"paged", "no cache", "torch.cat", "shifted buffer"} <= {row["implementation"] for row in rows}
    assert all(row["ms"] > 0 for row in rows) and all(len(curve) == shape.frames for curve in curves.values())


def test_a_long_video_is_measured_for_every_cache(modules):
    sample_bench = modules["sample_bench"]
    (video,) = sample_bench.long_videos(torch.device("cpu"))
    video = dataclasses.replace(video, frames=10, steps=1)
    rows = sample_bench.bench_long(video, torch.device("cpu"))
    assert [row["implementation"] for row in rows] == ["no cache", "cache", "multi-level cache"]
    assert [round(row["paper_over_multi_level"], 2) for row in rows] == [12.89, 1.64, 1.0]
    assert all(row["total_s"] > 0 for row in rows) and 0 < rows[2]["cache_mib"] < rows[1]["cache_mib"]


def test_a_rollout_is_measured_for_every_cache(modules):
    rollout_bench = modules["rollout_bench"]
    shape = rollout_bench.Shape("tiny", 1, 2, 1, 8, tokens=8, frames=8, window=5)
    rows = rollout_bench.bench(shape, torch.device("cpu"), seconds=0.0)
    saved = {row["implementation"]: row["saved_mib"] for row in rows}
    assert saved["paged"] < saved["torch.cat"] and saved["paged"] < saved["cloned cache"]
    assert all(row["ms"] > 0 for row in rows)


def test_training_step_is_measured_for_every_version(modules, monkeypatch):
    train_bench = modules["train_bench"]
    monkeypatch.setattr(train_bench, "compiled_baseline", lambda step: step)  # compiling takes a minute
    rows = train_bench.measure("tiny", MiMoConfig(**TINY), 2, torch.device("cpu"), LIMITS)
    assert [row["version"] for row in rows][:2] == ["MiMo", "ACDiT"] and len(rows) == 3
    mimo, acdit, baseline = rows
    assert mimo["matmul_gflop"] == baseline["matmul_gflop"] and mimo["attention_gflop"] == baseline["attention_gflop"]
    assert acdit["attention_gflop"] != mimo["attention_gflop"]
    assert all(row["ms"] > 0 and row["step_over_g"] > 0 for row in rows)


@pytest.mark.parametrize("system", [{}, {"recipe": "acdit", "mask_ratio": (0.0, 0.0), "mask_weight": 0.0}], ids=str)
def test_the_work_of_a_step_without_values_is_that_of_one_with(modules, system):
    """Counted as the step runs, and for ACDiT by hand: every row meets every weight of the blocks three times."""
    costs, train_bench = modules["system_costs"], modules["train_bench"]
    config = MiMoConfig(**TINY | {"frames": 3, "mask_ratio": (0.4, 0.4)} | system)
    found, step = costs.of_training(config), train_bench.Step(config, 1, torch.device("cpu"), "reference")
    ran = train_bench.work(step)
    for name in ("matmul_gflop", "attention_gflop"):
        assert found[name] == pytest.approx(ran[name], rel=1e-12)
    if not system:
        assert found["rows"] == 3 * (3 + 4)  # of 4 tokens of a clean frame int(0.4 * 4) = 1 is dropped
        return
    dim, rows, frames = config.dim, 24, 3
    pairs = 4 * 4 * ((1 + 2 + 3) + (1 + 2 + 3))  # clean on clean; noisy on itself and those before it
    assert found["rows"] == rows and found["pairs"] == pairs + 4 * 4 * (1 + 2 + 3)  # a last block without clean rows
    assert found["attention_gflop"] == pytest.approx(3.5 * 4 * found["pairs"] * dim / 1e9)
    block, noisy = 2 * (3 + 1 + 4 + 4) * dim * dim, rows // 2
    last = 2 * dim * dim * (3 * rows + (1 + 4 + 4) * noisy)  # clean rows end at their keys and values
    told = frames * 2 * (6 * 2 + 2) * dim * dim + frames * 2 * (256 + dim) * dim
    ends = 2 * config.channels * dim * (rows + noisy)
    total = 3 * (block * rows + last + told + ends)
    first = 2 * config.channels * dim * rows + frames * 2 * 256 * dim  # nobody wants a gradient of data
    assert found["matmul_gflop"] == pytest.approx((total - first) / 1e9, rel=0.02)


def test_every_system_has_its_costs(modules, tmp_path):
    """Counted for all of them, timed for two; and the tables beside the papers' figures, here of small networks."""
    costs, train_bench, common = modules["system_costs"], modules["train_bench"], modules["common"]
    presets = costs.systems(torch.device("cpu"))
    assert set(presets) == set(costs.TINY_SYSTEMS)
    for preset in presets.values():
        found = costs.of_training(MiMoConfig.from_preset(preset), clips=2)
        assert all(value > 0 for value in found.values()), preset
    assert costs.systems(torch.device("cuda"))["mimo"] == "mimo-xl-k600" and costs.family("far-b-k600") == "far"
    rows = train_bench.system_rows(
        torch.device("cpu"), {name: f"{name}-tiny" for name in ("acdit", "repa", "video-dit")}, 0.01
    )
    assert not any("note" in row for row in rows), rows
    acdit, _, at_once = rows
    assert acdit["rows"] == 2 * acdit["tokens"] == 2 * at_once["rows"] and acdit["sample_gflop_over_acdit"] == 1
    assert all(row["train_ms"] > 0 and row["sample_ms"] > 0 and row["train_gflop"] > 0 for row in rows)
    # Eight frames made together: each meets the weights once per step, and the keys of all eight.
    c = MiMoConfig.from_preset("video-dit-tiny")
    weights = c.depth * 12 * c.dim**2 * c.tokens + 2 * c.channels * c.dim * c.tokens
    pairs = c.depth * c.tokens**2 * c.frames * 4 * c.dim
    assert at_once["sample_gflop"] == pytest.approx(at_once["sample_steps"] * (2 * weights + pairs) / 1e9, rel=0.1)
    (distant,) = costs.long_contexts(("far-long-tiny",), (8,))
    assert distant["rows"] == 4 * 36 + 4 * 4  # the latest four frames, and four tokens of each before them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "table_8", lambda: [{"what": "Table 8", "preset": "acdit-tiny", **acdit, "ratio": 1.0}])
        patch.setattr(costs, "LONG", ("far-tiny",))
        patch.setattr(costs.long_contexts, "__defaults__", ((2, 4),))
        table = train_bench.systems_report(
            tmp_path, common.machine(torch.device("cpu")), LIMITS | {"matmul": "-"}, rows
        )
    assert "Table 8" in table and "Fig. 6" in table and (tmp_path / "systems.png").exists()
    long = [row for row in json.loads((tmp_path / "systems.json").read_text())["rows"] if row["what"] == "Fig. 6"]
    assert [row["rows"] for row in long] == [72, 144] and long[0]["pairs"] * 10 == 3 * long[1]["pairs"]


def test_every_stage_of_the_data_pipeline_is_measured(modules, tmp_path):
    pipeline, common, device = modules["data_pipeline"], modules["common"], torch.device("cpu")
    network = MiMoConfig(**TINY, compression=(4, 8, 8))
    size = pipeline.Size(network, clips=2, videos=3, frames=20, height=32, width=48, rounds=2, steps=5, workers=(1,))
    rows = pipeline.measure(size, device)
    stages = ["videos decoded", "videos kept", "videos encoded", "shards read", "training", "training"]
    assert [row["what"] for row in rows] == stages and all(0 < row["p20"] <= row["p80"] for row in rows)
    trained = {row["source"]: row for row in rows if row["what"] == "training"}
    assert set(trained) == {"latent shards", "videos"}
    for row in trained.values():
        assert 0 < row["wait_percent"] < 100 and row["ms_per_step"] > 0
    table = pipeline.report(tmp_path, common.machine(device), LIMITS | {"matmul": "none"}, rows)
    assert "From latent shards a step waits" in table and (tmp_path / "data.png").exists()
    assert json.loads((tmp_path / "data.json").read_text())["rows"] == rows


def test_waiting_is_what_the_loop_waits_for(modules):
    """A dataset that takes 50 ms a clip, read in the training process, is waited for; one that takes nothing is not."""
    pipeline = modules["data_pipeline"]
    network = MiMoConfig(**TINY, compression=(4, 8, 8))
    size = pipeline.Size(network, clips=2, videos=1, frames=1, height=1, width=1, rounds=1, steps=6, workers=(1,))

    class Clips:
        delay = 0.0
        num_classes = num_actions = None
        has_labels = has_actions = decodes = False

        def __len__(self):
            return 8

        def sample(self, index, seed):
            time.sleep(self.delay)
            return {"latents": np.zeros(network.latent_shape, np.float32)}

    slow = Clips()
    slow.delay = 0.05
    quick = pipeline._train("quick", Clips(), size, 0, torch.device("cpu"))
    waits = pipeline._train("slow", slow, size, 0, torch.device("cpu"))
    waited, hardly = (row["wait_percent"] / 100 * row["ms_per_step"] for row in (waits, quick))
    assert 100 <= waited and hardly < waited


def tune(*arguments, cache):
    """attn_tune.py in a process of its own, where Triton compiles instead of interpreting."""
    environment = processes.environment("TRITON_INTERPRET", TRITON_CACHE_DIR=cache)
    command = [sys.executable, FOLDER / "attn_tune.py", *arguments]
    return processes.run(command, env=environment, capture_output=True, text=True)


def test_tiles_are_compiled_ahead_without_a_gpu(tmp_path):
    run = tune("--dry-run", "--passes", "dq", "--head-dims", "128", "--configs", "64x32x4x2", cache=tmp_path)
    assert run.returncode == 0, run.stderr
    _, heading, present, other = run.stdout.splitlines()
    assert present.split()[:4] == ["dq", "128", "128x64x8x3", "*"] and other.split()[:3] == ["dq", "128", "64x32x4x2"]
    columns = heading[heading.index("registers") :].split("  ")
    assert [
        column.strip() for column in columns if column
    ] == "registers,shared KiB,programs/SM,spill stores,HGMMA,note".split(",")
    for line in (present, other):
        registers, shared, programs, stores, hgmma, note = line.split()[-6:]
        assert 0 < int(registers) <= 255 and 0 < float(shared) < 227 and int(programs) > 0
        assert stores == "0" and int(hgmma) > 0 and note == "-"
    assert len(list(tmp_path.glob("*/frame_attention_dq_kernel.cubin"))) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_tuning_needs_a_gpu(tmp_path):
    run = tune(cache=tmp_path)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "no CUDA GPU to measure on" in run.stderr


def test_suggested_tiles_are_the_fastest_by_the_rule_of_the_plans(modules):
    """Large tiles are quicker per pair; on one of two shapes small ones compute so many fewer that they win: both, with
    the cost that says so."""
    configs = modules["attn_configs"]
    measured = {
        "128x64x8x3": ((1.0, 100), (2.0, 200)),
        "64x64x4x3": ((1.2, 100), (1.2, 100)),
        "64x32x4x2": ((2.0, 100), (3.0, 90)),
    }
    rows = [
        {
            "sweep": "tiles",
            "pass": "dq",
            "head_dim": 128,
            "candidate": name,
            "shape": f"shape {i}",
            "ms": ms,
            "executed_pairs": pairs,
        }
        for name, figures in measured.items()
        for i, (ms, pairs) in enumerate(figures)
    ]
    best, gain, shapes = configs.suggestion(rows, "dq", 128, 90)
    assert configs.written(best) == "(Config(128, 64, 8, 3), Config(64, 64, 4, 3, 1.2))" and shapes == [
        "shape 0",
        "shape 1",
    ]
    assert gain == pytest.approx((1.0 * 2.0 / (1.0 * 1.2)) ** 0.5)  # the present choice is 128 x 64 alone
    one, gain, _ = configs.suggestion([row for row in rows if row["shape"] == "shape 1"], "dq", 128, 90)
    assert configs.written(one) == "(Config(64, 64, 4, 3),)" and gain == pytest.approx(2.0 / 1.2)
    assert configs.suggestion(rows[2:], "dq", 128, 90) is None  # nothing to compare with


def test_a_tile_that_works_ahead_is_written_and_read(modules):
    configs = modules["attn_configs"]
    ahead = configs.parsed("128x64x8x3+ahead")
    assert (
        configs.label(ahead) == "128x64x8x3+ahead"
        and configs.written((ahead,)) == "(Config(128, 64, 8, 3, ahead=True),)"
    )
    tried = configs.candidates("forward", 90, 128, None)
    assert ahead == tried[0] and configs.parsed("128x64x8x3") in tried
    masked = configs.parsed("128x64x8x3+masked2")
    assert configs.label(masked) == "128x64x8x3+masked2"
    assert configs.written((masked,)) == "(Config(128, 64, 8, 3, masked_stages=2),)"
    assert {masked, configs.parsed("128x64x8x3")} <= set(configs.candidates("dkv", 90, 72, None))
    assert not any(config.ahead for config in configs.candidates("forward", 90, 72, None))
