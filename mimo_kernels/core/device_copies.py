"""Tables that are made on the host and read on a device: schedules, work lists, rotations.

The rules, for every one of them:
- a device gets its copy once, from pinned memory, without waiting for it;
- a copy cannot be made inside a CUDA graph capture, where the upload would become part of the graph: it is refused;
- a stream other than the one of the upload is ordered behind it, and the copy's memory goes to nobody else before that
  stream is done;
- a captured graph that reads a copy keeps it alive: with `kept()` as long as whoever holds the graph says, else for
  good;
- tables are made outside of inference mode and of dispatch modes, so that they serve training and tracing as well.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mimo_kernels.core import torch_private

Copies = dict[int, tuple[Tensor, ...]]
_kept_for_good: Copies = {}
_capturing = threading.local()  # .kept: where the captures of this thread put what their graph reads


@contextlib.contextmanager
def kept() -> Iterator[Copies]:
    """Collects the copies that captures inside hand to their graph. Who replays the graph keeps what this yields as
    long:

        with kept() as copies, torch.cuda.graph(graph):
            ...

    A graph that is captured without it could outlive its tables; so they then live as long as the process.
    """
    before = getattr(_capturing, "kept", _kept_for_good)
    _capturing.kept = {}
    try:
        yield _capturing.kept
    finally:
        _capturing.kept = before


class DeviceCopies:
    """Host tensors that are never written again, and a copy of them for every device that asks.

    Args:
        name: what they are, for the refusal inside a capture: "FrameRows: these rows".
        host: tensors on the CPU.
    """

    def __init__(self, name: str, *host: Tensor):
        self.name, self.host = name, host
        self._copies: dict[str, tuple[Tensor, ...]] = {}
        self._uploads: dict[str, tuple[torch.cuda.Event, set[int]]] = {}  # the end of it; streams ordered behind it

    def on(self, device: torch.device | str) -> tuple[Tensor, ...]:
        """The tensors on this device. Where a FakeTensorMode is active, fake ones. ValueError inside a capture of the
        first use on a device."""
        if not isinstance(device, torch.device):
            device = torch.device(device)
        if not torch.compiler.is_compiling() and torch_private.dispatch_modes() and (mode := torch_private.fake_mode()):
            with mode:
                return tuple(mode.from_tensor(host).to(device) for host in self.host)
        if device.type == "cpu":
            return self.host
        key = str(device)
        if key not in self._copies:
            self._upload(key, device)
        elif device.type == "cuda" and not torch.compiler.is_compiling():
            self._order(key)
        return self._copies[key]

    def _upload(self, key: str, device: torch.device) -> None:
        cuda = device.type == "cuda" and not torch.compiler.is_compiling()
        if cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{self.name} were not used on {device} before and cannot be uploaded inside a CUDA graph capture;"
                " use them once before capturing"
            )
        with torch.inference_mode(False):
            hosts = (host.pin_memory() if cuda else host for host in self.host)
            self._copies[key] = tuple(host.to(device, non_blocking=True) for host in hosts)
        if cuda:
            stream = torch.cuda.current_stream(device)
            self._uploads[key] = stream.record_event(), {stream.cuda_stream}

    def _order(self, key: str) -> None:
        copies = self._copies[key]
        if torch.cuda.is_current_stream_capturing():
            # Whoever captures has waited for the device (torch.cuda.graph does); here no event can be waited for.
            getattr(_capturing, "kept", _kept_for_good)[id(copies)] = copies
            return
        uploaded, ordered = self._uploads.get(key) or (None, None)  # without it: uploaded while torch.compile traced
        if uploaded is None or ordered is None:
            return
        raw = torch_private.raw_stream(copies[0].get_device())
        if raw not in ordered:
            stream = torch.cuda.current_stream(copies[0].device)
            stream.wait_event(uploaded)
            for copy in copies:
                copy.record_stream(stream)
            ordered.add(raw)

    def __deepcopy__(self, memo: dict) -> "DeviceCopies":
        return self  # nobody writes into it

    def __reduce__(self) -> tuple:
        return DeviceCopies, (self.name, *self.host)


class OfTables:
    """What was made of host tables, kept as long as the table itself: a dict for each, by identity."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref, dict]] = {}

    def __getitem__(self, table: Tensor) -> dict:
        entry = self._made.get(id(table))
        if entry is None or entry[0]() is not table:
            forget = self._forget(id(table))
            entry = self._made[id(table)] = weakref.ref(table, forget), {}
        return entry[1]

    def _forget(self, key: int) -> Callable[[weakref.ref], None]:
        def forget(gone: weakref.ref) -> None:
            if key in self._made and self._made[key][0] is gone:  # else another table has the address by now
                del self._made[key]

        return forget

    def __len__(self) -> int:
        return len(self._made)
