"""The examples on small random weights: the outputs equal those of SDPA with a dense mask, and each runs as a
script."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from mimo_kernels import AxialRoPE
from mimo_kernels.attention import FrameMask, frame_attention, paged_frame_attention

from . import processes

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


def rollout_without_a_cache(model, noise, sigmas, window=None, sink=0):
    """The rollout of examples/self_forcing.py with keys and values in lists and torch's attention."""
    past, made = [], []  # per finished frame and layer: keys and values
    for number in range(noise.shape[1]):
        first = 0 if window is None else number - window + 1
        seen = [kept for time, kept in enumerate(past) if time >= first or time < sink]

        def attend(layer, q, k, v, seen=seen):
            keys, values = (torch.cat([*(kept[layer][i] for kept in seen), own], 1) for i, own in enumerate((k, v)))
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values))).transpose(1, 2)

        x, time = noise[:, number], torch.full(noise.shape[2:3], number)
        for step, sigma in enumerate(sigmas):
            with torch.set_grad_enabled(step + 1 == len(sigmas)):
                clean = model(x, time, sigma, attend)
            if step + 1 < len(sigmas):
                x = clean + sigmas[step + 1] * (noise[:, number] - clean)
        made.append(clean)
        kept = {}

        def write(layer, q, k, v, kept=kept, attend=attend):
            kept[layer] = (k, v)
            return attend(layer, q, k, v)

        with torch.no_grad():
            model(clean, time, 0.0, write)
        past.append(kept)
    return torch.stack(made, 1)


@pytest.mark.parametrize("options", [{}, {"window": 3, "sink": 1}])
def test_self_forcing_has_the_gradient_of_the_rollout_without_a_cache(options):
    example = load("self_forcing")
    torch.manual_seed(0)
    model, noise = example.CausalTransformer(), torch.randn(2, 5, 6, 4)
    cached = example.rollout(model, noise, [1.0, 0.6], **options)
    assert_same(model, cached, rollout_without_a_cache(model, noise, [1.0, 0.6], **options))


def test_what_a_rollout_saves_does_not_grow_with_the_history():
    """Of a frame; torch.cat would save the whole history with every frame and layer."""
    example = load("self_forcing")
    torch.manual_seed(0)
    model = example.CausalTransformer()
    frames = []
    for count in (2, 6):
        cache = example.new_cache(model, 1, count, 16)
        seq = cache.new_sequence()
        for _ in range(count):
            kv = torch.randn(2, 1, 16, model.heads, 16)
            cache.append([seq], [kv[0]] * 2, [kv[1]] * 2)
        q, k, v = torch.randn(3, 1, 16, model.heads, 16, requires_grad=True).unbind()
        view = cache.view([seq], max_pages=8)
        out = paged_frame_attention(q, k, v, cache, layer=0, view=view)
        kept = [x.untyped_storage() for x in out.grad_fn.saved_tensors if x is not None]
        frames.append(sum(x.nbytes() for x in kept if x.data_ptr() != cache.pool.untyped_storage().data_ptr()))
    assert 0 < frames[0] == frames[1]


def test_a_history_made_anew_is_what_the_rollout_had():
    example = load("self_forcing")
    torch.manual_seed(0)
    model, frames = example.CausalTransformer(), torch.randn(2, 3, 16, 4)
    cache = example.new_cache(model, 4, 3, 16)
    seqs = [cache.new_sequence() for _ in range(2)]
    view = cache.view(seqs, max_pages=3)

    def attend(layer, q, k, v):
        return paged_frame_attention(q, k, v, cache, layer=layer, view=view)

    for number in range(3):
        example.remember(model, cache, seqs, frames[:, number], torch.full((16,), number), attend)
        view.refresh()
    anew = example.recompute(model, cache, frames)
    for one, other in zip(seqs, anew):
        for number in range(3):
            torch.testing.assert_close(cache.frame(other, number), cache.frame(one, number), atol=1e-5, rtol=1e-5)


def test_a_sink_that_moves_with_the_window():
    """Against attention over keys rotated once, every frame alone."""
    example = load("rolling_sink")
    torch.manual_seed(0)
    rope = AxialRoPE(example.HEAD_DIM)
    q, k, v = torch.randn(3, 1, 9, example.TOKENS, example.HEADS, example.HEAD_DIM)
    out = example.rollout(q, k, v, rope)
    for time in range(9):
        first = max(0, time - example.WINDOW + 1)
        times = list(range(first, time + 1))
        placed = [(number, number) for number in times]
        if 0 not in times:
            placed.insert(0, (0, time - example.WINDOW))
        keys = torch.cat([example.rotated(k[:, number], at, rope) for number, at in placed], 1)
        values = torch.cat([v[:, number] for number, _ in placed], 1)
        x = example.rotated(q[:, time], time, rope), keys, values
        expected = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in x)).transpose(1, 2)
        torch.testing.assert_close(out[:, time], expected, atol=1e-5, rtol=1e-5)


def test_both_ways_to_shard_equal_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", str(EXAMPLES / "sharded.py")]
    done = processes.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = dict(re.findall(r"process (\d: \w+) differs from one process by at most (\S+)", done.stdout))
    assert len(errors) == 6 and all(float(error) < 1e-5 for error in errors.values())


@pytest.mark.parametrize(("chunks", "clean"), [([1, 2, 2], True), ([2, 1, 2, 2], False), ([2], True)])
def test_anyflow_is_what_its_own_processor_computes(chunks, clean):
    """Against FlexAttention under the BlockMask that the transformer builds for itself."""
    example = load("anyflow")
    torch.manual_seed(0)
    transformer = example.small_transformer()
    given = example.inputs(chunks, clean)
    mask = example.far_mask(transformer, given["hidden_states"], chunks, clean=clean)
    with torch.no_grad():
        expected = transformer(**given)[0]
        example.use_frame_masks(transformer)
        actual = transformer(**given, attention_mask=mask)[0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    loss = transformer(**given, attention_mask=mask)[0].square().sum()
    assert all(gradient is not None for gradient in torch.autograd.grad(loss, transformer.blocks.parameters()))


def test_a_backend_of_diffusers():
    example = load("diffusers_backend")
    torch.manual_seed(0)
    mask, other = FrameMask.block_causal([[16, 16, 16]]), FrameMask.block_causal([[16, 16]])
    transformer = load("wan").small_transformer()
    latents, text, timestep = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 16), torch.tensor([500])

    def run():
        return transformer(latents, timestep, text, return_dict=False)[0]

    plain = run()
    for block in transformer.blocks:
        block.attn1.set_processor(DenseMaskProcessor(mask))
    expected = run()
    for block in transformer.blocks:
        block.attn1.set_processor(WanAttnProcessor())
    example.register()
    example.register()
    transformer.set_attention_backend("frame_mask")
    assert torch.equal(run(), plain)  # no mask: torch's own attention
    with example.frame_mask(other):  # neither for one of other counts
        assert torch.equal(run(), plain)
    with example.frame_mask(mask):
        assert_same(transformer, run(), expected)
    transformer.reset_attention_backend()
    assert torch.equal(run(), plain)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dit_block", "largest difference of the outputs"),
        ("wan", "velocity of the noisy frames: [1, 4, 3, 8, 8]"),
        ("rollout", "largest difference from attention under the whole mask"),
        ("self_forcing", "loss of a rollout of 6 frames"),
        ("anyflow", "velocity: [1, 4, 4, 8, 8]"),
        ("diffusers_backend", "velocity under a block-causal mask: [1, 4, 3, 8, 8]"),
        ("rolling_sink", "the sink was never more than 4 frames away"),
    ],
)
def test_examples_run_as_scripts(name, says, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert says in printed


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
