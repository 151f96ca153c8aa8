"""Several processes (gloo, on the CPU) train what one trains: curves, averages, checkpoints, bad data."""

import functools
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from mimo import checkpoint
from mimo.config import TrainConfig
from mimo.errors import InputError
from mimo.sampling.loading import load as load_for_sampling
from mimo.training.distributed import process_group
from mimo.training.log import read_log
from mimo.training.loop import train

from ..processes import finish, in_ranks, start_ranks
from .small_runs import SAME_NETWORK, VARIANTS, NanAt, make_trainer, whole_state
from .test_launched import assert_one_line_and_status_2

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = Path(__file__).with_name("small_runs.py")


# Equal training ---------------------------------------------------------------------------------------------------

PARTS = ("diffusion", "mask", "alignment", "grad_norm")


@functools.cache
def alone(variant):
    """Records and final tensors of one process."""
    model, options = VARIANTS[variant]
    trainer = make_trainer(model, **options)
    return train(trainer), whole_state(trainer)


def assert_same_training(records, tensors, variant):
    expected, expected_tensors = alone(variant)
    assert len(records) == len(expected) == 4
    for record, one in zip(records, expected, strict=True):
        for part in PARTS:
            assert record[part] == pytest.approx(one[part], rel=2e-5), (record["step"], part)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        # AdamW's first steps have the size of the rate whatever the gradient's: where it is near zero, sums show.
        torch.testing.assert_close(tensor, expected_tensors[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulated_training_equals_training_in_one_piece(variant):
    model, options = VARIANTS[variant]
    trainer = make_trainer(model, **options, accumulate=4)
    records = train(trainer)
    assert_same_training(records, whole_state(trainer), variant)


def test_two_ranks_train_what_one_trains(tmp_path):
    """Both strategies, with and without accumulation, recomputation and offload, in one pair of processes."""
    runs = [
        *(("ddp", variant, {}) for variant in VARIANTS),
        *(("fsdp", variant, {}) for variant in VARIANTS if variant not in SAME_NETWORK),
        ("ddp", "plain", {"accumulate": 2, "recompute": True}),
        ("fsdp", "plain", {"accumulate": 2, "recompute": True}),
        ("fsdp", "plain", {"cpu_offload": True}),
    ]
    records = in_ranks(
        2,
        RUNS,
        """
        from torch.distributed.tensor import DTensor
        records = []
        for number, (strategy, variant, options) in enumerate(values["runs"]):
            model, more = VARIANTS[variant]
            trainer = make_trainer(model, **more, strategy=strategy, **options)
            records.append(train(trainer))
            sharded = [isinstance(t, DTensor) for t in (*trainer.model.parameters(), *trainer.ema.tensors.values())]
            assert all(sharded) if strategy == "fsdp" else not any(sharded)
            head = trainer.model.head.out if trainer.model_config.token_depth else trainer.model.head
            assert strategy == "ddp" or len(head.weight.to_local()) == 6
            state = whole_state(trainer)
            averaged = trainer.averaged()
            assert (averaged is not None) == world.leads
            if world.leads:
                assert all(torch.equal(state[f"ema.{name}"], t) for name, t in averaged.state_dict().items())
                torch.save(state, f"{values['folder']}/{number}.pt")
        report(records)
        """,
        runs=runs,
        folder=str(tmp_path),
    )
    for number, (_, variant, _) in enumerate(runs):
        assert_same_training(records[number], torch.load(tmp_path / f"{number}.pt"), variant)


def test_recomputed_activations_give_equal_gradients():
    gradients = []
    for recompute in (False, True):
        trainer = make_trainer(recompute=recompute, grad_clip=1e9)
        trainer.optimizer.step = lambda trainer=trainer: gradients.append(
            [parameter.grad.clone() for parameter in trainer.model.parameters()]
        )
        trainer.start_data()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            trainer.train_step()
        gradients[-1].append(sum(saved))
    *plain, much = gradients[0]
    *again, little = gradients[1]
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True)) and len(plain) > 40
    assert little < 0.5 * much  # of what is kept between forward and backward


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_checkpoints_reshard(tmp_path):
    """fsdp on 2 -> ddp on 2 -> alone -> fsdp on 4 -> alone, bit for bit; each writes anew what the one before wrote."""
    hops = """
        from pathlib import Path
        for strategy, source, target in values["hops"]:
            trainer = make_trainer(strategy=strategy)
            if source is None:
                trainer.start_data()
                trainer.train_step()
                trainer.train_step()
            else:
                with world.together():
                    trainer.load(checkpoint.latest(Path(source))[0])
            trainer.save(Path(target))
        report(trainer.step)
    """

    def load(folder):
        trainer = make_trainer()
        trainer.load(checkpoint.latest(folder)[0])
        assert trainer.step == 2 and trainer.ema.updates == 2
        return trainer

    fsdp2, ddp2, alone, fsdp4 = folders = [tmp_path / name for name in ("fsdp2", "ddp2", "alone", "fsdp4")]
    in_ranks(2, RUNS, hops, hops=[("fsdp", None, str(fsdp2)), ("ddp", str(fsdp2), str(ddp2))])
    trainer = load(ddp2)
    trainer.save(alone)
    in_ranks(4, RUNS, hops, hops=[("fsdp", str(alone), str(fsdp4))])
    first, state, last = whole_state(load(fsdp2)), whole_state(trainer), whole_state(load(fsdp4))
    assert first.keys() == state.keys() == last.keys() and len(state) > 100
    assert [name for name in state if not torch.equal(first[name], state[name])] == []
    assert [name for name in state if not torch.equal(last[name], state[name])] == []
    sampled = load_for_sampling(fsdp4, device=torch.device("cpu")).model.state_dict()
    assert all(torch.equal(state[f"ema.{name}"], tensor) for name, tensor in sampled.items())
    parts = [list(folder.glob("checkpoints/step_00000002/model/shard-*")) for folder in folders]
    assert [len(files) for files in parts] == [2, 2, 1, 4]
    sizes = [sum(file.stat().st_size for file in files) for files in parts]
    assert max(sizes) < 1.8 * min(sizes)  # what all ranks hold is written once


def test_a_damaged_shard_stops_every_rank_with_one_message(tmp_path):
    run = tmp_path / "run"
    train(make_trainer(steps=1), run)
    (file,) = (run / "checkpoints" / "step_00000001" / "ema").iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    saw = in_ranks(
        2,
        RUNS,
        """
        from pathlib import Path
        saw = ""
        try:
            train(make_trainer(steps=2), Path(values["run"]), resume=True)
        except InputError as error:
            saw = str(error)
        report(world.gather(saw))
        """,
        run=str(run),
    )
    assert sum(bool(words) for words in saw) == 1 and "checksum of ema/shard-00001" in "".join(saw)


def test_a_full_disk_of_one_rank_is_said_once(tmp_path):
    saw = in_ranks(
        2,
        RUNS,
        """
        import resource
        from pathlib import Path
        trainer, saw = make_trainer(strategy="fsdp"), None
        if not world.leads:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            trainer.save(Path(values["run"]))
        except InputError as error:
            saw = str(error)
        report(world.gather(saw))
        """,
        run=str(tmp_path),
    )
    assert sorted(map(bool, saw)) == [False, True] and "step_00000000 cannot be written: File too large" in "".join(saw)
    assert checkpoint.latest(tmp_path) == (None, [])


# Steps that are not finite --------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks_alike():
    found = in_ranks(
        2,
        RUNS,
        """
        found = []
        for strategy in ("ddp", "fsdp"):
            trainer = make_trainer(strategy=strategy, max_skipped=2, steps=5)
            trainer.objective.recipe = NanAt(trainer, steps=(0, 2, 3), rank=1)
            trainer.start_data()
            moved = []
            for step in range(5):
                before = whole_state(trainer)
                trainer.train_step()
                trainer.sums.require_finite()
                after = whole_state(trainer)
                zero = {name: torch.zeros_like(tensor) for name, tensor in after.items()}
                moved.append(sum(not torch.equal(after[name], (zero | before)[name]) for name in after))
                if step == 1:  # the first that counts
                    assert all(torch.equal(t, after["ema" + n[5:]]) for n, t in after.items() if n.startswith("model."))
            means, _ = trainer.sums.take()
            finite = all(tensor.isfinite().all().item() for tensor in after.values())
            found.append([moved, int(trainer.ema.updates), means["skipped"], finite, means["diffusion"]])
        report(found)
        """,
    )
    for moved, updates, skipped, finite, diffusion in found:
        assert moved[0] == moved[2] == moved[3] == 0 and min(moved[1], moved[4]) > 100
        assert updates == 2 and skipped == 3 and finite and 0 < diffusion < 10


def test_too_many_skipped_steps_end_training_and_name_the_first(tmp_path):
    trainer = make_trainer(max_skipped=2, steps=9, save_every=1)
    trainer.objective.recipe = NanAt(trainer, steps=(1, 3, 4, 5))
    with pytest.raises(InputError, match="diverged at step 4: .* nor is it finite in the 2 steps after it"):
        train(trainer, tmp_path)
    assert checkpoint.latest(tmp_path)[0].name == "step_00000005"
    assert [row["skipped"] for row in read_log(tmp_path)] == [0, 1, 0, 1, 1]
    tensors = checkpoint.read_tensors(
        checkpoint.latest(tmp_path)[0], "model", checkpoint.read_state(checkpoint.latest(tmp_path)[0])
    )
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_divergence_is_said_once():
    saw = in_ranks(
        2,
        RUNS,
        """
        trainer, saw = make_trainer(), None
        trainer.objective.recipe = NanAt(trainer, steps=(1,))
        try:
            train(trainer)
        except InputError as error:
            saw = str(error)
        report(world.gather(saw))
        """,
    )
    assert saw[0].startswith("training diverged at step 2") and saw[1] == ""


def test_data_that_one_rank_alone_cannot_use_stops_all(tmp_path):
    """In the middle of training: the rank that meets the bad label says so, the other one does not wait for it."""
    program = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(RUNS.parent)!r})
        from small_runs import *
        import mimo.cli
        from mimo.training.distributed import process_group
        from mimo.training.loop import train
        from pathlib import Path

        class Command:
            def run(self):
                with process_group(gpu=False):
                    train(make_trainer(odd=7, steps=50), Path(sys.argv[1]))

        mimo.cli.parse = lambda argv: Command()
        sys.exit(mimo.cli.main(["train"]))
        """
    )
    results = finish(start_ranks(2, [sys.executable, "-c", program, str(tmp_path)]))
    said = assert_one_line_and_status_2(results, "label 7 in the data, expected 0..2")
    assert sum(said) == 1


def test_more_processes_than_gpus(monkeypatch):
    gpus, words = torch.cuda.device_count(), []
    for rank in range(gpus, gpus + 3):
        for name, value in {"RANK": rank, "WORLD_SIZE": gpus + 3, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(InputError) as caught, process_group(gpu=True):
            pass
        words.append(str(caught.value))
    assert words == [f"LOCAL_RANK={gpus}: expected a process per GPU, of which this machine has {gpus}", "", ""]


def test_offload_needs_shards_and_fsdp_a_launcher():
    with pytest.raises(ValueError, match="cpu_offload=True: expected False unless strategy is 'fsdp'"):
        TrainConfig(cpu_offload=True)
    with pytest.raises(ValueError, match="strategy='fsdp': expected .*torchrun"):
        make_trainer(strategy="fsdp")
    assert make_trainer(strategy="ddp").shared is not None  # alone there is nothing to share
