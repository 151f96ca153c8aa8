"""What compute-sanitizer finds on a GPU, for Triton kernels under the interpreter: every load and store is looked up
before it happens."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


class Launch:
    """The memory of one launch: which bytes lie in its tensor arguments, and which program has written and read
    them."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor]):
        self.kernel, self.tensors = kernel, tensors
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
        storages[0] = 0  # for what lies below all of them
        self.base = np.array(sorted(storages), dtype=np.int64)
        self.size = np.array([storages[base] for base in self.base.tolist()], dtype=np.int64)
        self.start = np.cumsum(self.size) - self.size  # of a storage, in the arrays below
        total = int(self.size.sum())
        lent = torch.zeros(total, dtype=torch.bool)
        for t in tensors.values():
            size = t.element_size()
            start = int(self.start[np.searchsorted(self.base, t.untyped_storage().data_ptr())])
            strides = [stride * size for stride in t.stride()]
            lent.as_strided((*t.shape, size), (*strides, 1), start + t.storage_offset() * size).fill_(True)
        self.lent = lent.numpy()
        self.writer, self.reader = (np.full(total, NOBODY) for _ in range(2))

    def places(self, address: np.ndarray, size: int, what: str) -> np.ndarray:
        """Index of the addresses into the arrays; AssertionError for bytes that are in no tensor argument."""
        address = address.astype(np.int64)
        storage = np.searchsorted(self.base, address, side="right") - 1
        offset = address - self.base[storage]
        place = self.start[storage] + offset
        inside = offset + size <= self.size[storage]
        inside[inside] = self.lent[place[inside]] & self.lent[place[inside] + size - 1]
        assert inside.all(), f"{self.kernel}: {what} outside of its arguments: {self._near(int(address[~inside][0]))}"
        return place

    def load(self, program: int, place: np.ndarray, address: np.ndarray, values: np.ndarray) -> None:
        writer = self.writer[place]
        self._refuse(
            writer == program, address, "a load of what the program itself stored, with no order between its threads"
        )
        self._refuse(writer != NOBODY, address, "a load of what another program stores")
        poison = np.isnan(values) if values.dtype.kind == "f" else values == np.iinfo(values.dtype).max
        self._refuse(poison, address, "a load of what nobody has stored")
        alone = np.isin(self.reader[place], (NOBODY, program))
        self.reader[place] = np.where(alone, program, SEVERAL)

    def store(self, program: int, place: np.ndarray, address: np.ndarray) -> None:
        assert len(np.unique(place)) == len(place), f"{self.kernel}: two lanes store to one element"
        self._refuse(~np.isin(self.writer[place], (NOBODY, program)), address, "a store to what another program stores")
        self._refuse(~np.isin(self.reader[place], (NOBODY, program)), address, "a store to what another program loads")
        self.writer[place] = program

    def _refuse(self, wrong: np.ndarray, address: np.ndarray, what: str) -> None:
        assert not wrong.any(), f"{self.kernel}: {what}: {self._near(int(address[wrong][0]))}"

    def _near(self, address: int) -> str:
        """The address relative to the argument that begins closest below it."""
        below = {name: address - t.data_ptr() for name, t in self.tensors.items() if t.data_ptr() <= address}
        name = min(below, key=below.get, default=None)
        return (
            "before all of them" if name is None else f"{name} + {below[name]} bytes ({list(self.tensors[name].shape)})"
        )


@contextlib.contextmanager
def watched_kernels() -> Iterator[list[str]]:
    """Inside, an interpreted kernel stops with an error when a lane that is not masked off

        loads or stores outside of the kernel's tensor arguments, taken exactly: gaps between strided rows are outside;
        loads what nobody has stored: NaN, or the largest integer, as memory holds it inside `poisoned_memory`;
        stores to an element that another program or lane stores to or another program loads, or loads what is stored
        in the same launch: programs of a launch have no order, nor have the threads of a program.

    Gives the names of the kernels launched so far. An atomic operation is an error too: results are to be the same bits
    every time."""
    launches: list[str] = []
    launch = None
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    arguments, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def watch_arguments(self, args, kwargs):
        nonlocal launch
        hosts, keywords = arguments(self, args, kwargs)
        named = {**dict(zip(self.arg_names, hosts)), **keywords}
        tensors = {name: t for name, t in named.items() if isinstance(t, Tensor) and t.numel()}
        launch = Launch(self.fn.__name__, tensors)
        launches.append(launch.kernel)
        return hosts, keywords

    def lanes(self, pointers, mask):
        (x, y, z), (width, height, _) = self.grid_idx, self.grid_dim
        program, on = x + width * (y + height * z), np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        return program, on, pointers.data[on], pointers.get_element_ty().primitive_bitwidth // 8

    def watch_load(self, pointers, mask, *rest, **options):
        program, on, address, size = lanes(self, pointers, mask)
        place = launch.places(address, size, "a load")  # before it is done: it may end the process
        result = load(self, pointers, mask, *rest, **options)
        launch.load(program, place, address, result.data[on])
        return result

    def watch_store(self, pointers, value, mask, *rest, **options):
        program, _, address, size = lanes(self, pointers, mask)
        launch.store(program, launch.places(address, size, "a store"), address)
        return store(self, pointers, value, mask, *rest, **options)

    def refuse(self, *args):
        raise AssertionError("an atomic operation: nothing fixes the order of its sums, so no kernel here has one")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", watch_arguments)
        patch.setattr(builder, "create_masked_load", watch_load)
        patch.setattr(builder, "create_masked_store", watch_store)
        for name in ("create_atomic_cas", "create_atomic_rmw"):
            patch.setattr(builder, name, refuse)
        yield launches
