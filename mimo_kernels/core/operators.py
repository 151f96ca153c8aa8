"""The table of operators: a row here is what makes an operator public, reported, emulated and tested.

Needs nothing but the standard library, so that the package can name its operators where torch does not load.
"""

from typing import NamedTuple


class Operator(NamedTuple):
    """name: of the public function.   family: the module under mimo_kernels that holds it, its torch operators and
    describe_backends.   backends: those it can have, whatever the machine.   sources: its kernels in csrc/, if they are
    CUDA (Triton's stand beside the function)."""

    name: str
    family: str
    backends: tuple[str, ...]
    sources: tuple[str, ...] = ()


OPERATORS = (
    Operator(
        "frame_attention",
        "attention.frame",
        ("triton", "cuda", "reference"),
        ("attention_sm90.cu", "attention_sm90_backward.cu"),
    ),
    Operator("paged_frame_attention", "attention.paged", ("triton", "reference")),
    Operator("gather_tokens", "ops.token_rows", ("cuda", "reference"), ("tokens.cu",)),
    Operator("scatter_tokens", "ops.token_rows", ("cuda", "reference"), ("tokens.cu",)),
    Operator("modulate", "ops.adaln", ("cuda", "reference"), ("modulate.cu",)),
    Operator("gated_residual_modulate", "ops.adaln", ("cuda", "reference"), ("modulate.cu",)),
    Operator("qk_norm_rope", "ops.rope", ("cuda", "reference"), ("qk_norm_rope.cu", "qk_rope.cu")),
    Operator("bias_gelu", "ops.gelu", ("cuda", "reference"), ("gelu.cu",)),
    Operator("weighted_squared_error", "ops.losses", ("cuda", "reference"), ("losses.cu",)),
    Operator("guided_step", "ops.guidance", ("triton", "reference")),
)
