"""The examples on small random weights: the outputs equal those of SDPA with a dense mask, and each runs as a
script."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from mimo_kernels.attention import FrameMask, frame_attention

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wan():
    return load("wan")


class DenseMaskProcessor(WanAttnProcessor):
    """diffusers' own processor, given the mask as a matrix."""

    def __init__(self, mask):
        super().__init__()
        self.dense = mask.to_dense()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.dense, rotary_emb)


def gradients(model, out):
    return torch.autograd.grad(
        out.square().sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )


def assert_same(model, actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    for one, other in zip(gradients(model, actual), gradients(model, expected)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"window": 2, "sink": 1}])
def test_wan_block_causal(wan, options):
    torch.manual_seed(0)
    transformer = wan.small_transformer()
    latents, text, timestep = torch.randn(2, 4, 4, 8, 8), torch.randn(2, 5, 16), torch.tensor([300, 700])
    mask = wan.block_causal_mask(transformer, latents, **options)
    outputs = []
    for processor in (wan.FrameMaskProcessor, DenseMaskProcessor):
        for block in transformer.blocks:
            block.attn1.set_processor(processor(mask))
        outputs.append(transformer(latents, timestep, text, return_dict=False)[0])
    assert_same(transformer, *outputs)

    wan.set_frame_mask(transformer, mask)
    with torch.no_grad():
        before = transformer(latents, timestep, text, return_dict=False)[0]
        latents[:, :, 2] += 1
        after = transformer(latents, timestep, text, return_dict=False)[0]
    changed = (before != after).flatten(3).any(-1).any(1).any(0)
    assert changed.tolist() == [False, False, True, True]


def test_wan_teacher_forcing(wan):
    torch.manual_seed(0)
    transformer = wan.small_transformer()
    clean, noisy = torch.randn(2, 2, 4, 3, 8, 8)
    text, timesteps = torch.randn(2, 5, 16), torch.tensor([[100, 500, 900], [0, 999, 1]])
    mask = wan.teacher_forcing_mask(transformer, noisy)

    def run():
        return wan.teacher_forcing(transformer, clean, noisy, timesteps, text)

    wan.set_frame_mask(transformer, mask)
    actual = run()
    for block in transformer.blocks:
        block.attn1.set_processor(DenseMaskProcessor(mask))
    assert_same(transformer, actual, run())

    # Every frame alone, its clean past before it: what sampling does, block causal with the last frame noisy.
    for frame in range(3):
        latents = torch.cat([clean[:, :, :frame], noisy[:, :, frame : frame + 1]], dim=2)
        wan.set_frame_mask(transformer, wan.block_causal_mask(transformer, latents))
        per_frame = torch.cat([torch.zeros(2, frame, dtype=timesteps.dtype), timesteps[:, frame : frame + 1]], dim=1)
        with torch.no_grad():
            out = transformer(latents, per_frame.repeat_interleave(16, dim=1), text, return_dict=False)[0]
        torch.testing.assert_close(out[:, :, -1], actual[:, :, frame], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "mask", [FrameMask.teacher_forcing([[5, 3, 4]], [[8, 8, 8]]), FrameMask.block_causal([[7, 1, 6]], window=2)]
)
def test_dit_block(mask):
    example = load("dit_block")
    torch.manual_seed(0)
    before, after = example.DiTBlock(32, 4), example.FrameDiTBlock(32, 4)
    after.load_state_dict(before.state_dict())
    x, condition = torch.randn(2, mask.num_tokens, 32), torch.randn(2, 32)
    expected, actual = before(x, condition, mask.to_dense()), after(x, condition, mask)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients(after, actual), gradients(before, expected), atol=1e-4, rtol=1e-3)


def test_rollout_with_a_cache_equals_the_whole_mask():
    example = load("rollout")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 12, example.HEADS, example.HEAD_DIM)
    whole = frame_attention(*(x.flatten(1, 2) for x in (q, k, v)), FrameMask.block_causal([[12] * 5]))
    torch.testing.assert_close(example.rollout(q, k, v).flatten(1, 2), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dit_block", "largest difference of the outputs"),
        ("wan", "velocity of the noisy frames: [1, 4, 3, 8, 8]"),
        ("rollout", "largest difference from attention under the whole mask"),
    ],
)
def test_examples_run_as_scripts(name, says, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"FrameMask\.\w+: 1 clip", printed) and says in printed


def test_readme_says_what_runs(capsys, monkeypatch):
    """Its Python, block after block, and the drawing that it shows. The network of the last block is not built: it is
    large."""
    page = (EXAMPLES.parent / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 3
    monkeypatch.setattr("mimo.MiMo", lambda config: config, raising=False)
    names = {}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out.strip() in page
    assert names["model"].depth == 12
