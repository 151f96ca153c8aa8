"""The launchers of csrc/ as Python calls them: by keyword, and what is wrong is named."""

import re
from pathlib import Path

import pytest

from mimo_kernels.core import backends
from mimo_kernels.core.operators import OPERATORS

CSRC = Path(__file__).parents[2] / "csrc"
GELU = {"y": 0, "x": None, "bias": None, "bias_float": False, "rows": 0, "dim": 8, "dtype": 0, "device": 0, "stream": 0}


@pytest.fixture(scope="module")
def kernels():
    module = backends.extension()
    if not hasattr(module, "launchers"):
        pytest.skip(backends.extension_reason())
    return module


def definitions() -> dict[str, list[tuple[str, str]]]:
    """Launcher -> (name, type) of its parameters, as csrc defines them; what MIMO_LAUNCHER repeats must say the
    same."""
    rows, functions = {}, {}
    for path in CSRC.glob("*.cu"):
        text = path.read_text()
        rows |= dict(re.findall(r"MIMO_LAUNCHER\((\w+),\s*([^)]*)\)", text))
        functions |= dict(re.findall(r"^int (\w+)\(([^{};]*?)\) \{", text, re.MULTILINE))
    found = {}
    for name, names in rows.items():
        parameters = [" ".join(parameter.split()) for parameter in functions[name].split(",")]
        found[name] = [re.fullmatch(r"(.*?[ *])(\w+)", parameter).groups()[::-1] for parameter in parameters]
        assert [parameter for parameter, _ in found[name]] == [word.strip() for word in names.split(",")]
    return found


def test_rows_repeat_the_names_of_their_functions(kernels):
    kinds = {"int": "i", "int64_t": "l", "bool": "b", "float": "f", "Rows": "p", "List": "p"}
    expected = {
        name: tuple(
            (parameter, ("r" if type.startswith("const") else "w") if "*" in type else kinds[type.strip()])
            for parameter, type in parameters
        )
        for name, parameters in definitions().items()
    }
    assert kernels.launchers == expected and len(expected) > 10


def test_every_file_of_kernels_has_a_row_in_the_table():
    files = {path.name for path in CSRC.glob("*.cu") if "MIMO_LAUNCHER" in path.read_text()}
    files.discard("probe_sm90.cu")  # instructions alone, for a test
    assert files == {source for operator in OPERATORS for source in operator.sources}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": ...}, TypeError, "argument x is missing"),
        ({"z": 1}, TypeError, "has no argument z"),
        ({"dim": 1 << 40}, OverflowError, "argument dim: does not fit into 32 bits"),
        ({"rows": 1 << 70}, OverflowError, "argument rows: "),
        ({"rows": 0.5}, TypeError, "argument rows: "),
        ({"y": "a"}, TypeError, "argument y: "),
        ({"dim": 7}, RuntimeError, "invalid argument"),
        ({"dtype": 3}, RuntimeError, "invalid argument"),
    ],
)
def test_a_wrong_call_is_named(kernels, change, error, message):
    arguments = {name: value for name, value in (GELU | change).items() if value is not ...}
    with pytest.raises(error, match=f"^bias_gelu_forward: {message}"):
        kernels.bias_gelu_forward(**arguments)


def test_positions_are_not_taken(kernels):
    with pytest.raises(TypeError, match="^bias_gelu_forward: takes its arguments by keyword"):
        kernels.bias_gelu_forward(*GELU.values())


def test_a_pair_is_a_pair(kernels):
    arguments = {name: (0, 0) if kind == "p" else 0 for name, kind in kernels.launchers["modulate_backward"]}
    for wrong in (0, (0,), (0, 0, 0), (0, "a")):
        with pytest.raises(TypeError, match="^modulate_backward: argument scale: "):
            kernels.modulate_backward(**arguments | {"scale": wrong})


def test_keywords_in_any_order_and_computed_names(kernels):
    """Names that were put together at run time are other objects than those that stand in a source."""
    shuffled = {"".join(list(name)): value for name, value in reversed(GELU.items())}
    with pytest.raises(RuntimeError, match="^bias_gelu_forward: "):
        kernels.bias_gelu_forward(**shuffled | {"dim": 7})
