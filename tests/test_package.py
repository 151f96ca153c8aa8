"""The package as installed: lazy names, the extension's account of itself, backend choice, collect_env without torch or
Triton."""

import importlib
import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mimo_kernels
from mimo.__main__ import PACKAGES
from mimo_kernels import collect_env
from mimo_kernels.core import backends
from mimo_kernels.core.operators import OPERATORS, Operator
from mimo_kernels.testing import assert_within_budget, between_nans, poisoned_memory

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> str:
    """Standard output of a fresh interpreter; the test fails when it does."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", mimo_kernels.__all__)
def test_public_names_load(name: str):
    value = getattr(mimo_kernels, name)
    assert callable(value) and value.__name__ == name
    assert name in dir(mimo_kernels)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'moduulate'"):
        _ = mimo_kernels.moduulate


def test_no_file_bears_the_name_of_a_function():
    """Else the import system would put the module where the package promises the function."""
    assert not [name for name in mimo_kernels.__all__ if importlib.util.find_spec(f"mimo_kernels.{name}")]


def test_import_loads_the_standard_library_and_little_of_it():
    """Neither torch nor Triton nor numpy: the package can say what is missing, and costs a script nothing."""
    code = "import sys; before = set(sys.modules); import mimo_kernels; print(*(set(sys.modules) - before))"
    loaded = set(python(code).split())
    ours = {"mimo_kernels", "mimo_kernels.core", "mimo_kernels.core.operators"}
    assert ours <= loaded and len(loaded) < 40
    assert {name.partition(".")[0] for name in loaded - ours} <= sys.stdlib_module_names


def test_extension_says_what_it_was_compiled_for():
    module = backends.extension()
    assert module is not None, backends.extension_reason()
    assert isinstance(module.cuda_archs, tuple)
    if module.cuda_archs:
        assert all(arch.startswith(("sm_", "compute_")) for arch in module.cuda_archs)
        assert module.cuda_version in module.cuda_compiler
        assert backends.extension_reason() == ""
    else:
        assert module.cuda_reason and module.cuda_reason in backends.extension_reason()


def test_extension_loads_without_driver_torch_or_libcudart():
    """Nothing but the C and C++ libraries is linked, so the module loads wherever Python does."""
    code = """
        import mimo_kernels._C
        maps = open("/proc/self/maps").read()
        print([name for name in ("libcudart", "libcuda.so", "libtorch") if name in maps])
    """
    assert python(code).strip() == "[]"


@pytest.mark.parametrize(
    "archs, capability, serves",
    [
        (("sm_80",), (8, 0), True),
        (("sm_80",), (8, 9), True),
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_90a",), (10, 0), False),
        (("sm_100",), (10, 3), True),
        (("sm_100f",), (10, 3), True),
        (("sm_100a",), (10, 3), False),
        (("sm_100",), (12, 0), False),
        (("sm_80", "compute_100"), (12, 0), True),
        (("compute_100",), (9, 0), False),
        (("compute_90a",), (10, 0), False),
    ],
)
def test_which_gpu_runs_what(archs: tuple[str, ...], capability: tuple[int, int], serves: bool):
    assert backends._runs_on(capability, archs) is serves


@pytest.mark.parametrize(
    ("driver", "compiled", "needed"),
    [
        (12080, "13.0", "13.0"),
        (13000, "13.0", ""),
        (13010, "13.2", ""),
        (14000, "13.0", ""),
        (11080, "12.8", "12.0"),
        (12000, "12.8", ""),
        (13000, "12.8", ""),
        (11080, "11.8", "12.0"),
    ],
)
def test_a_driver_of_an_older_major_version_is_refused(driver, compiled, needed, monkeypatch):
    extension = {"cuda_archs": ("sm_90a",), "cuda_version": compiled, "driver_version": lambda: driver}
    monkeypatch.setattr(backends, "_extension", SimpleNamespace(**extension))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    refusals = backends.cuda_refusals(torch.device("cuda"))
    served = f"{driver // 1000}.{driver % 1000 // 10}"
    assert refusals == ([f"the driver serves CUDA up to {served}, needed is {needed} or newer"] if needed else [])


def test_choose():
    refusals = {"triton": ["no triton", "q is on cpu"], "cuda": [], "reference": []}
    assert backends.choose("op", "auto", refusals) == "cuda"
    assert backends.choose("op", "reference", refusals) == "reference"
    with pytest.raises(ValueError, match=r"^op: backend 'triton' cannot serve: no triton; q is on cpu$"):
        backends.choose("op", "triton", refusals)
    with pytest.raises(
        ValueError, match=r"^op: unknown backend 'flash'; expected one of auto, triton, cuda, reference$"
    ):
        backends.choose("op", "flash", refusals)
    with pytest.raises(ValueError, match=r"^op: no backend can serve: 'cuda': a, b; 'reference': c$"):
        backends.choose("op", "auto", {"cuda": ["a", "b"], "reference": ["c"]})


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_every_operator_is_served_on_the_cpu_by_its_reference(operator: Operator):
    """Also where Triton is interpreted, as in these tests: an interpreted kernel serves only who asks for it."""
    family = importlib.import_module(f"mimo_kernels.{operator.family}")
    refusals = family.describe_backends(torch.device("cpu"))
    assert backends.choose(operator.name, "auto", refusals) == "reference"
    assert set(refusals) == set(operator.backends)
    assert getattr(mimo_kernels, operator.name) is getattr(family, operator.name)
    assert all(reason.strip() for reasons in refusals.values() for reason in reasons)


def test_collect_env_here():
    report = collect_env.render(collect_env.collect())
    assert mimo_kernels.__version__ in report and torch.__version__ in report
    assert report.count("operators on") == 2 and "fails" not in report
    for op in OPERATORS:
        assert report.count(f"  {op.name} ") == 1 + torch.cuda.is_available()
    assert ("torch sees no CUDA device" in report) is not torch.cuda.is_available()


def test_collect_env_tells_the_version_that_loads(monkeypatch: pytest.MonkeyPatch):
    """torch says 2.15.0+cu132, the metadata of its wheel 2.15.0."""
    monkeypatch.setattr(torch, "__version__", "2.15.0+cu132")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.15.0")
    assert collect_env.collect()["packages"]["torch"] == "2.15.0+cu132"


@pytest.mark.parametrize("blocked", [["torch"], ["triton"], ["torch", "triton"], ["mimo_kernels._C"]])
def test_collect_env_without(blocked: list[str]):
    report = python(f"""
        import runpy
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name in {blocked}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Blocker())
        runpy.run_module("mimo_kernels.collect_env", run_name="__main__")
    """)
    for name in blocked:
        assert f"No module named {name!r}" in report
    made_in = "Python (mimo_kernels.planner)" if "mimo_kernels._C" in blocked else "C++ (mimo_kernels._C)"
    assert f" {made_in}\n" in report and " ms per batch\n" in report
    operators = report.partition("operators on cpu")[2].splitlines()
    if "torch" in blocked:
        assert operators[1].split(maxsplit=1) == ["none", "torch does not load"]
        return
    for op in [operator.name for operator in OPERATORS]:
        answer = next(line.removeprefix(f"  {op} ").strip() for line in operators if line.startswith(f"  {op} "))
        assert answer.startswith("reference")


class TestBudget:
    exact = torch.linspace(-3, 3, 1000)
    plain = exact.bfloat16()

    def test_accepts_the_plain_result_and_the_exact_one(self):
        assert_within_budget(self.plain, self.plain, self.exact)
        assert_within_budget(self.exact, self.plain, self.exact)

    def test_refuses_one_bad_element_and_names_it(self):
        actual = self.plain.float()
        actual[7] += 0.1
        with pytest.raises(AssertionError, match=r"dq: largest error 1\.\d+e-01 exceeds .* worst at \(7,\)"):
            assert_within_budget(actual, self.plain, self.exact, name="dq")

    def test_refuses_a_bias_that_no_single_element_shows(self):
        with pytest.raises(AssertionError, match="root mean square error"):
            assert_within_budget(self.exact + 0.0075, self.plain, self.exact)

    def test_refuses_nan_shape_and_a_rounded_reference(self):
        actual = self.plain.clone()
        actual[3] = float("nan")
        with pytest.raises(AssertionError, match=r"1 non-finite values differ; at \(3,\)"):
            assert_within_budget(actual, self.plain, self.exact)
        with pytest.raises(AssertionError, match="shape"):
            assert_within_budget(actual[:-1], self.plain, self.exact)
        with pytest.raises(AssertionError, match="expected float32 or float64"):
            assert_within_budget(self.plain, self.plain, self.plain)

    def test_infinities_have_to_stand_where_they_stand(self):
        exact = torch.tensor([0.0, -torch.inf])
        assert_within_budget(exact.clone(), exact, exact)
        with pytest.raises(AssertionError, match="non-finite"):
            assert_within_budget(-exact, exact, exact)
        with pytest.raises(AssertionError, match="non-finite"):
            assert_within_budget(torch.tensor([-torch.inf, -torch.inf]), exact, exact)


def test_poisoned_memory():
    with poisoned_memory():
        assert torch.empty(1000).isnan().all() and torch.empty(64, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_between_nans():
    x = torch.randn(5, 24, dtype=torch.float16, requires_grad=True)
    y = between_nans(x)
    assert torch.equal(x, y) and y.requires_grad and y.is_leaf and y.is_contiguous() and y.data_ptr() % 16 == 0
    around = y.detach().as_strided((y.numel() + 2,), (1,), y.storage_offset() - 1)
    assert around[0].isnan() and around[-1].isnan()


WITHOUT_EXTRA = """
    import sys
    from mimo.__main__ import PACKAGES, main
    sys.modules.update(dict.fromkeys(PACKAGES))  # as if none of them were installed
"""


def test_kernels_need_torch_alone():
    python(WITHOUT_EXTRA + "    import mimo_kernels.attention, mimo_kernels.testing, mimo_kernels.collect_env\n")


def test_the_benchmark_of_a_plain_installation_has_no_plot_and_says_so(tmp_path):
    words = python(
        WITHOUT_EXTRA
        + f"""
    import pathlib
    sys.path.insert(0, {str(ROOT / "benchmarks")!r})
    import attn_bench, common
    common.bar_plot(pathlib.Path({str(tmp_path)!r}) / "attention.png", [], title="", **attn_bench.PLOT)
    """
    )
    assert words.startswith("matplotlib is not installed: attention.png is not drawn") and words.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_what_to_install():
    code = textwrap.dedent(WITHOUT_EXTRA) + "sys.modules['tqdm'] = sys\nsys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    names = "av, einops, huggingface_hub, matplotlib, pillow, safetensors, tensorboard, torchmetrics, tyro"
    assert result.stderr == f"error: mimo needs {names}: pip install 'mimo-kernels[mimo]'\n"


def test_the_extra_is_what_the_command_line_asks_for():
    declared = re.search(r"^mimo = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert set(re.findall(r'"([\w-]+)', declared)) == set(PACKAGES.values())
