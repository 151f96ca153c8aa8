"""Tables of the host on a device: one upload, refused in a capture, other streams behind it, kept by a graph that reads
it.

The device is simulated here, so that every rule is tried without a GPU; tests/gpu tries them on one."""

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mimo_kernels import AxialRoPE, FrameRows, modulate, qk_norm_rope
from mimo_kernels.core import device_copies, torch_private
from mimo_kernels.core.device_copies import DeviceCopies, OfTables, kept


class Stream:
    def __init__(self, number: int):
        self.cuda_stream, self.waited = number, []

    def record_event(self) -> tuple[str, int]:
        return "event", self.cuda_stream

    def wait_event(self, event) -> None:
        self.waited.append(event)


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA device in which nothing happens but what DeviceCopies asks of it."""
    state = SimpleNamespace(stream=Stream(1), capturing=False, uploads=[], recorded=[])
    to = torch.Tensor.to

    def upload(self, device, **options):
        if torch.device(device).type != "cuda":
            return to(self, device, **options)
        assert options == {"non_blocking": True} and not torch.is_inference_mode_enabled()
        state.uploads.append(self)
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "to", upload)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: state.recorded.append((self, stream)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state.stream)
    monkeypatch.setattr(torch_private, "raw_stream", lambda index: state.stream.cuda_stream)
    monkeypatch.setattr(device_copies, "_kept_for_good", {})
    return state


def test_the_host_has_no_copy():
    table = torch.arange(5)
    copies = DeviceCopies("this table", table)
    assert copies.on("cpu")[0] is table and copies.on(torch.device("cpu"))[0] is table


def test_a_device_gets_one_copy(cuda):
    copies = DeviceCopies("these tables", torch.arange(5), torch.ones(2))
    with torch.inference_mode():
        first = copies.on("cuda:0")
    assert len(cuda.uploads) == 2 and all(a is b for a, b in zip(first, copies.on(torch.device("cuda:0"))))
    assert len(cuda.uploads) == 2 and not any(t.is_inference() for t in first)
    assert copies.on("cuda:1")[0] is not first[0] and len(cuda.uploads) == 4


def test_a_capture_does_not_upload(cuda):
    copies = DeviceCopies("this table", torch.arange(5))
    cuda.capturing = True
    with pytest.raises(ValueError, match="^this table were not used on cuda:0 before and cannot .* before capturing$"):
        copies.on("cuda:0")
    cuda.capturing = False
    copies.on("cuda:0")
    cuda.capturing = True
    copies.on("cuda:0")
    assert len(cuda.uploads) == 1


def test_another_stream_waits_once_and_holds_the_memory(cuda):
    copies = DeviceCopies("these tables", torch.arange(5), torch.ones(2))
    on_device = copies.on("cuda:0")
    copies.on("cuda:0")
    assert not cuda.stream.waited and not cuda.recorded  # the stream of the upload need not wait
    cuda.stream = second = Stream(2)
    copies.on("cuda:0")
    copies.on("cuda:0")
    assert second.waited == [("event", 1)]
    assert all(t is mine and stream is second for (t, stream), mine in zip(cuda.recorded, on_device, strict=True))


def test_a_graph_keeps_what_it_reads(cuda):
    def captured() -> torch.Tensor:
        copies = DeviceCopies("this table", torch.arange(5))
        (on_device,) = copies.on("cuda:0")
        cuda.capturing = True
        copies.on("cuda:0")
        cuda.capturing = False
        return on_device

    with kept() as mine:
        table = captured()
    assert [t is table for copies in mine.values() for t in copies] == [True]
    assert not device_copies._kept_for_good
    other = captured()  # nobody says how long its graph lives
    assert [t is other for copies in device_copies._kept_for_good.values() for t in copies] == [True]
    assert len(mine) == 1


def test_copied_and_sent_to_a_process():
    copies = DeviceCopies("this table", torch.arange(5))
    copies.on("meta")
    assert copy.deepcopy(copies) is copies
    sent = pickle.loads(pickle.dumps(copies))
    assert torch.equal(sent.on("cpu")[0], torch.arange(5)) and sent.name == "this table" and not sent._copies
    rows = pickle.loads(pickle.dumps(FrameRows([2, 3], [-1, 0])))
    assert rows.row_on("cpu").tolist() == [-1, -1, 0, 0, 0]


def test_what_is_made_of_a_table_goes_with_it():
    made, table = OfTables(), torch.arange(4)
    made[table]["plan"] = 1
    assert made[table] == {"plan": 1} and made[table.clone()] == {}
    gc.collect()
    assert len(made) == 1
    del table
    gc.collect()
    assert len(made) == 0


def test_tables_of_a_saved_tensor_outlive_its_name():
    """Autograd holds the table until the backward, which must find what the forward made."""
    made = OfTables()

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, table):
            ctx.save_for_backward(table)
            made[table]["plan"] = 1
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * made[ctx.saved_tensors[0]]["plan"], None

    x = torch.ones(1, requires_grad=True)
    table = torch.arange(4)
    y = Keep.apply(x, table)
    del table
    gc.collect()
    y.backward()
    assert x.grad.item() == 1
    del y
    gc.collect()
    assert len(made) == 0


def test_fake_tensors_get_fake_tables():
    rows, rope = FrameRows([2, 3], [-1, 0]), AxialRoPE(8)
    with FakeTensorMode():
        x, scale = torch.empty(5, 8), torch.empty(1, 8)
        assert modulate(x, scale, scale, rows).shape == (5, 8)
        q, k = qk_norm_rope(
            torch.empty(4, 3, 2, 8), torch.empty(8), torch.empty(8), torch.empty(4, 3, dtype=torch.int32), rope
        )
        assert q.shape == k.shape == (4, 2, 8)
        assert FrameRows([2, 3], [-1, 0]).num_rows == 5  # host tables are real ones, wherever they are made
        lens = torch.empty(2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"^FrameRows: lens is a tensor without values"):
            FrameRows(lens, [0, 0])
    with torch.device("meta"):
        assert torch.equal(FrameRows([2, 3], [-1, 0]).row_on("cpu"), rows.row_on("cpu"))
        assert torch.equal(AxialRoPE(8).tables_on("cpu")[0], rope.tables_on("cpu")[0])
    with pytest.raises(ValueError, match=r"^FrameRows: lens is a tensor without values"):
        FrameRows(torch.empty(2, dtype=torch.int64, device="meta"), [0, 0])


def test_rows_built_inside_a_compiled_function_break_its_graph():
    def function(x, scale):
        return modulate(x, scale, scale, FrameRows([2, 3], [-1, 0]))

    x, scale = torch.randn(5, 8), torch.randn(1, 8)
    torch.testing.assert_close(torch.compile(function, backend="eager")(x, scale), function(x, scale))
