"""qk_norm_rope in all its variants, the emulated CUDA kernels and the reference, against the equations in float64."""

from ..kernels.emulation import emulation
from ..kernels.rope_variants import check_variant, variants
from .registry import check_examples, fuzzer


@fuzzer("rope-cuda", ci_seeds=1)
def on_the_kernels(seed: int) -> int:
    with emulation():
        return check_examples(seed, 12, variants(), lambda case: check_variant(case, "cuda"))


@fuzzer("rope-reference", ci_seeds=1)
def on_the_reference(seed: int) -> int:
    return check_examples(seed, 40, variants(), lambda case: check_variant(case, "reference"))
