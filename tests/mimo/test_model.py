"""Sizes, training forward, sampling forward, ablation switches and torch.compile of the network."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from mimo import MiMo, MiMoConfig
from mimo.config import PRESETS
from mimo.network.blocks import FixedPositions
from mimo.network.frames import clean_and_noisy
from mimo.network.report import parameter_report
from mimo.recipes import build_recipe, recipe_type
from mimo.recipes.base import step_generator

TINY = MiMoConfig(
    depth=3,
    dim=32,
    heads=2,
    frames=4,
    height=2,
    width=3,
    channels=5,
    decoder_depth=2,
    decoder_layer=2,
)


def build(**changes) -> MiMo:
    """A small network in which nothing is zero, so that every path carries a signal."""
    torch.manual_seed(0)
    model = MiMo(dataclasses.replace(TINY, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(config: MiMoConfig, clips: int = 2, frames: int = 4):
    """history, noisy, timestep, keep, labels, actions"""
    generator = torch.Generator().manual_seed(1)
    history, noisy = torch.randn(2, clips, frames, config.tokens, config.channels, generator=generator).unbind()
    timestep = 1000 * torch.rand(clips, frames, generator=generator)
    keep = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])[:clips]
    labels = torch.randint(max(config.num_classes, 1), (clips,), generator=generator)
    actions = torch.randint(max(config.num_actions, 1), (clips, frames), generator=generator)
    return history, noisy, timestep, keep, labels, actions


def run(model: MiMo, history, noisy, timestep, *, reconstruct: bool = True, taps=(), **given):
    return model(clean_and_noisy(history, noisy, timestep, **given), reconstruct=reconstruct, taps=taps)


def optional(config: MiMoConfig, labels, actions) -> dict:
    """The conditions that this network takes."""
    return {"labels": labels if config.num_classes else None, "actions": actions if config.num_actions else None}


# ------------------------------------------------------------------------------------------------------------ sizes


def count_by_hand(c: MiMoConfig) -> int:
    """Every weight, from the shapes of the paper's network."""
    d, hidden, head = c.dim, int(c.mlp_ratio * c.dim), c.dim // c.heads
    linear = lambda i, o: i * o + o  # noqa: E731
    layer_norm = 2 * d
    core = linear(d, 3 * d) + (2 * head if c.qk_norm else 0) + linear(d, d) + linear(d, hidden) + linear(hidden, d)
    channels = c.channels * c.patch**2  # of a token
    total = linear(channels, d) + linear(256, d) + linear(d, d)
    if c.positions == "learned":
        total += (c.frames + c.tokens) * d * (2 if c.mask_weight else 1)  # the decoder has its own
    total += (c.num_classes + 1) * d if c.num_classes else 0
    total += (c.num_actions + 1) * d if c.num_actions else 0
    total += c.max_interval * d
    if c.token_depth:  # no timestep, nothing modulated; the mask token, and a head that has a timestep of its own
        w, wide = c.token_width, c.text_dim
        total += d - linear(256, d) - linear(d, d)
        across = layer_norm + linear(d, d) + linear(wide or d, 2 * d) + (2 * head if c.qk_norm else 0) + linear(d, d)
        total += c.depth * (core + 2 * layer_norm + (across if c.cross_attention else 0)) + layer_norm
        total += 3 * wide  # null text, norm of texts
        total += (3 * c.tokens if c.learned_places else 0) * d + c.noise_levels * d
        total += linear(channels, w) + linear(d, w) + linear(256, w) + linear(w, w)
        return (
            total
            + c.token_depth * (2 * w + 2 * linear(w, w) + linear(w, 3 * w))
            + linear(w, 2 * w)
            + linear(w, channels)
        )
    total += c.depth * (core + linear(d, 6 * d))
    history_norms = 2 * c.depth - (1 if c.decoder_layer < c.depth or not c.mask_weight else 0)
    total += history_norms * layer_norm if c.separate_ln else 0
    total += linear(d, 2 * d) + linear(d, c.channels)
    if c.coarse_stride:  # its own embedding and projections; nobody reads what coarse rows collect in the last block
        total += linear(c.coarse_stride**2 * c.channels, d)
        total += c.depth * linear(d, 3 * d) + (c.depth - 1) * linear(d, d)
    if c.mask_weight:
        total += d + len(c.mask_offsets) * d  # learned query, offset embedding
        total += c.decoder_depth * (core + 2 * layer_norm) + layer_norm + linear(d, c.channels)
    if c.repa_weight:
        total += (
            linear(d, c.repa_hidden) + linear(c.repa_hidden, c.repa_hidden) + linear(c.repa_hidden, c.repa_channels)
        )
    return total


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_of_the_presets(name):
    config = MiMoConfig.from_preset(name)
    with torch.device("meta"):
        model = MiMo(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == count_by_hand(config)
    report = dict(line.rsplit(maxsplit=1) for line in parameter_report(model).splitlines())
    numbers = {part.strip(): int(number.replace(",", "")) for part, number in report.items()}
    assert numbers["total"] == count
    heads = [part for part in (model.decoder, model.projection) if part is not None]
    added = sum(parameter.numel() for part in heads for parameter in part.parameters())
    assert numbers["total when sampling"] == count - added


@pytest.mark.parametrize(
    "changes",
    [
        {"separate_ln": False},
        {"decoder_layer": 3},
        {"mask_weight": 0.0},
        {"positions": "sincos"},
        {"positions": "learned"},
        {"qk_norm": False},
    ],
    ids=str,
)
def test_parameter_counts_of_ablations(changes):
    model = build(**changes)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_by_hand(model.config)


def test_fixed_positions_are_those_of_dit():
    """Against loops over channels; and they do not end where the training clips do."""
    config = dataclasses.replace(TINY, positions="sincos")
    found = FixedPositions(config)(torch.tensor([[3, 1, 2], [90, 0, 0]], dtype=torch.int32))

    def waves(position, width):
        angles = [position / 10_000 ** (2 * i / width) for i in range(width // 2)]
        return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])

    for row, (t, y, x) in zip(found, ((3, 1, 2), (90, 0, 0)), strict=True):
        expected = torch.cat([waves(x, 16), waves(y, 16)]) + waves(t, 32)
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
    build(positions="sincos").history_frame(torch.zeros(2, 6, 5), 90, ListCache(2).write)


@torch.no_grad()
def test_rope_split_and_qk_norm_are_switches():
    history, noisy, timestep, *_ = batch(TINY)
    outputs = [
        run(build(**changes), history, noisy, timestep).velocity
        for changes in ({}, {"rope_split": (4, 6, 6)}, {"rope_split": (6, 6, 4)}, {"qk_norm": False})
    ]
    assert torch.equal(outputs[0], outputs[1])  # heads of 16: a third each
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3) and not torch.allclose(*outputs[::3], atol=1e-3)


def test_a_fresh_network_predicts_zero_velocity():
    """AdaLN-zero: the head starts at zero and future rows pass every block unchanged."""
    torch.manual_seed(0)
    model = MiMo(TINY)
    history, noisy, timestep, keep, *_ = batch(TINY)
    output = run(model, history, noisy, timestep, keep=keep)
    assert output.velocity.abs().max() == 0
    assert output.reconstruction[0].abs().max() > 0


# ------------------------------------------------------------------------------------------- sampling equals training


class ListCache:
    """Keys and values of earlier frames as plain lists, per layer: what a sampler's cache must amount to."""

    def __init__(self, sequences: int) -> None:
        self.sequences, self.kept = sequences, {}

    def _attend(self, layer: int, q, k, v, *, store: bool):
        q, k, v = (x.unflatten(0, (self.sequences, -1)).transpose(1, 2) for x in (q, k, v))  # [S, h, N, d]
        earlier = self.kept.get(layer, [])
        keys, values = (torch.cat([*(e[i] for e in earlier), x], dim=2) for i, x in enumerate((k, v)))
        if store:
            self.kept[layer] = [*earlier, (k, v)]
        return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(0, 1)

    def write(self, layer: int, q, k, v):
        return self._attend(layer, q, k, v, store=True)

    def read(self, layer: int, q, k, v):
        return self._attend(layer, q, k, v, store=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"separate_ln": False},
        {"positions": "learned"},
        {"positions": "sincos", "qk_norm": False},
        {"rope_split": (4, 6, 6), "qk_norm": False},
        {"num_classes": 7, "num_actions": 3},
        {"separate_ln": False, "num_classes": 7, "num_actions": 3, "decoder_layer": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_frame_by_frame_equals_the_full_forward(changes):
    model = build(**changes)
    history, noisy, timestep, _, labels, actions = batch(model.config)
    given = optional(model.config, labels, actions)
    full = run(model, history, noisy, timestep, **given)
    assert full.reconstruction == {}
    cache = ListCache(len(history))
    for t in range(history.shape[1]):
        now = None if given["actions"] is None else actions[:, t]
        position = torch.full((2,), t) if t % 2 else t  # both forms
        velocity = model.future_frame(
            noisy[:, t], timestep[:, t], position, cache.read, labels=given["labels"], actions=now
        )
        torch.testing.assert_close(velocity, full.velocity[:, t], rtol=1e-5, atol=1e-5)
        model.history_frame(history[:, t], position, cache.write, actions=now)
    assert sorted(cache.kept) == list(range(model.config.depth))


@torch.no_grad()
def test_no_cache_equals_dropped_history():
    model = build()
    history, noisy, timestep, *_ = batch(TINY)
    dropped = run(model, history, noisy, timestep, drop_history=torch.ones(2, 4, dtype=torch.bool)).velocity
    for t in range(4):
        alone = model.future_frame(noisy[:, t], timestep[:, t], t, ListCache(2).read)
        torch.testing.assert_close(alone, dropped[:, t], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sequences_may_be_at_different_positions():
    model = build()
    history, noisy, timestep, *_ = batch(TINY)
    together = model.future_frame(noisy[:, 0], timestep[:, 0], torch.tensor([1, 3]), ListCache(2).read)
    for s, position in enumerate((1, 3)):
        alone = model.future_frame(noisy[s : s + 1, 0], timestep[s : s + 1, 0], position, ListCache(1).read)
        torch.testing.assert_close(together[s : s + 1], alone, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- conditions


@torch.no_grad()
def test_conditions_matter_and_none_is_null():
    model = build(num_classes=7, num_actions=3)
    history, noisy, timestep, keep, labels, actions = batch(model.config)
    forward = lambda **given: run(model, history, noisy, timestep, keep=keep, **given)  # noqa: E731
    null = forward(labels=torch.full((2,), 7), actions=torch.full((2, 4), 3))
    absent = forward()
    assert torch.equal(null.velocity, absent.velocity)
    with_labels, with_actions = forward(labels=labels), forward(actions=actions)
    assert not torch.equal(with_labels.velocity, null.velocity)
    assert not torch.equal(with_actions.velocity, null.velocity)
    # History knows its actions, and neither class nor timestep: its keys and values serve every step and every branch.
    assert torch.equal(with_labels.reconstruction[0], null.reconstruction[0])
    assert not torch.equal(with_actions.reconstruction[0], null.reconstruction[0])
    later = run(model, history, noisy, 0.5 * timestep, keep=keep)
    assert torch.equal(later.reconstruction[0], null.reconstruction[0])


@torch.no_grad()
def test_history_alone_reconstructs_the_same():
    for changes in ({}, {"decoder_layer": 3}, {"separate_ln": False}):
        model = build(**changes)
        history, noisy, timestep, keep, *_ = batch(TINY)
        both, alone = run(model, history, noisy, timestep, keep=keep), run(model, history, None, None, keep=keep)
        assert alone.velocity is None
        for offset in (0, 1):
            torch.testing.assert_close(alone.reconstruction[offset], both.reconstruction[offset], rtol=1e-5, atol=1e-5)
        silent = run(model, history, noisy, timestep, keep=keep, reconstruct=False)
        assert silent.reconstruction == {} and torch.equal(silent.velocity, both.velocity)


@torch.no_grad()
def test_kept_tokens_keep_their_coordinates():
    """A mask that drops the last tokens equals a network that never had them, as far as RoPE is concerned."""
    model = build()
    history, noisy, timestep, *_ = batch(TINY)
    keep = torch.tensor([[0, 1, 2]]).expand(2, -1)
    masked = run(model, history, noisy, timestep, keep=keep)
    garbled = history.clone()
    garbled[:, :, 3:] = 1e3
    torch.testing.assert_close(
        run(model, garbled, noisy, timestep, keep=keep).velocity, masked.velocity, rtol=0, atol=0
    )
    elsewhere = run(model, history.roll(1, 2), noisy, timestep, keep=keep + 1)  # the same contents at other places
    assert not torch.allclose(elsewhere.velocity, masked.velocity, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"separate_ln": False},
        {"attention": "factorized", "depth": 4, "positions": "sincos", "mask_weight": 0.0, "mask_ratio": (0.0, 0.0)},
    ],
    ids=str,
)
def test_only_noisy_rows_ask_in_the_last_block(changes, monkeypatch):
    """Outputs and gradients are those of a last block in which all rows ask and only noisy ones go on: to the bit where
    frames attend by themselves, to rounding where tracks share calls of the reference."""
    model = build(**changes)
    history, noisy, timestep, *_ = batch(model.config)

    def results(attend):
        """The rows that came out of the last attention; the velocity and all gradients."""
        rows = []

        def watched(self, packed, *given):
            out = attend(self, packed, *given)
            rows.append(len(out))
            return packed.predicted.rows(out.flatten(1)).unflatten(1, out.shape[1:]) if attend is everyone else out

        monkeypatch.setattr(MiMo, "_attend_last", watched)
        model.zero_grad()
        velocity = run(model, history, noisy, timestep, reconstruct=False).velocity
        (velocity.square().sum() + velocity.sum()).backward()
        return rows, [velocity, *(p.grad for p in model.parameters() if p.grad is not None)]

    everyone = MiMo._attend
    (last, ours), (every, theirs) = results(MiMo._attend_last), results(everyone)
    assert last == [noisy[..., 0].numel()] and every[0] > last[0]
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        largest = 0.0 if model.config.attention == "joint" else float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * largest)


@torch.no_grad()
def test_both_backends_agree():
    automatic = build()
    plain = MiMo(TINY, backend="reference")
    plain.load_state_dict(automatic.state_dict())
    history, noisy, timestep, keep, *_ = batch(TINY)
    first, second = (run(m, history, noisy, timestep, keep=keep) for m in (automatic, plain))
    torch.testing.assert_close(first.velocity, second.velocity, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.reconstruction[1], second.reconstruction[1], rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- ablations


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "learned"},
        {"positions": "sincos"},
        {"qk_norm": False},
        {"separate_ln": False},
        {"mask_region": "all"},
        {"mask_offsets": (0,)},
        {"mask_offsets": (1,)},
        {"mask_offsets": (2, 0, 1)},
        {"decoder_layer": 1},
        {"decoder_layer": 3},
        {"decoder_depth": 0},
        {"mask_weight": 0.0},
        {"num_classes": 7, "num_actions": 3},
        {"parameterization": "flow"},
    ],
    ids=str,
)
def test_every_parameter_of_every_ablation_learns(changes):
    """One step of the recipe leaves a finite gradient, not zero, on every parameter: none is unused."""
    model = build(**changes)
    history, _, _, _, labels, actions = batch(model.config)
    given = optional(model.config, labels, actions)
    latents = history.unflatten(2, (2, 3))
    loss = build_recipe(model.config).loss(model, latents, generator=step_generator(0, 0, "cpu"), **given)
    loss.total.backward()
    assert loss.total.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_bf16_autocast_runs_forward_and_backward():
    model = build(num_actions=3)
    history, noisy, timestep, keep, _, actions = batch(model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model, history, noisy, timestep, keep=keep, actions=actions)
    exact = run(model, history, noisy, timestep, keep=keep, actions=actions)
    assert output.velocity.dtype == torch.bfloat16
    for low, high in ((output.velocity, exact.velocity), (output.reconstruction[1], exact.reconstruction[1])):
        assert (low.float() - high).square().mean() < 1e-3 * high.square().mean()
    (output.velocity.float().square().mean() + output.reconstruction[0].float().square().mean()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_compiles_whole():
    """`compute` is one graph, for any number of kept tokens and any drop of history."""
    small = {"depth": 2, "decoder_layer": 1, "decoder_depth": 0}
    model, eager = build(**small), build(**small)
    model.compute = torch.compile(model.compute, fullgraph=True, backend="aot_eager")
    history, noisy, timestep, keep, *_ = batch(TINY)
    for kept, drop in ((keep, None), (keep[:, :3], torch.rand(2, 4) < 0.5), (keep[:, :2], None)):
        compiled, expected = (run(m, history, noisy, timestep, keep=kept, drop_history=drop) for m in (model, eager))
        torch.testing.assert_close(compiled.velocity, expected.velocity, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled.reconstruction[1], expected.reconstruction[1], rtol=1e-5, atol=1e-5)
    for output in (compiled, expected):
        (output.velocity.square().mean() + output.reconstruction[0].square().mean()).backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_by_name():
    model, plain = build(), build(mask_weight=0.0)
    history, noisy, timestep, keep, *_ = batch(TINY)
    cases = [
        (lambda: run(model, history[:, :, :5], noisy, timestep), r"noisy is \[2, 4, 6, 5\].*\[2, 4, 5, 5\]"),
        (lambda: run(model, history, noisy[:1], timestep), r"noisy is \[1, 4, 6, 5\].*\[2, 4, 6, 5\]"),
        (lambda: run(model, history, noisy, timestep[:, :2]), r"timestep is \[2, 2\]"),
        (lambda: run(model, history, noisy, None), "noisy and timestep"),
        (lambda: run(model, history, None, None), "clean frames alone"),
        (lambda: run(plain, history, None, None, keep=keep), "clean frames alone"),
        (lambda: run(model, history, noisy, timestep, keep=keep[:1]), r"keep is \[1, 4\]"),
        (lambda: run(model, history, noisy, timestep, drop_history=torch.ones(2, 3)), r"drop_history is \[2, 3\]"),
        (lambda: run(build(positions="learned"), *batch(TINY, frames=5)[:3]), "5 frames.*end at 4"),
        (lambda: run(model, history, noisy, timestep, labels=torch.zeros(2).long()), "labels are given.*num_classes=0"),
        (
            lambda: run(model, history, noisy, timestep, actions=torch.zeros(2, 4).long()),
            "actions are given.*num_actions=0",
        ),
        (lambda: build(positions="learned").history_frame(history[:, 0], 4, ListCache(2).write), "5 frames.*end at 4"),
        (lambda: MiMo(TINY, backend="triton"), "backend='triton'.*'auto'"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_conditions_that_change_history_are_named():
    """Keys and values of a history frame differ with the conditions that its recipe names, and with no other."""
    for options, expected in (({}, set()), ({"num_actions": 4}, {"actions"}), ({"num_classes": 3}, set())):
        torch.manual_seed(0)
        small = {"depth": 2, "dim": 48, "heads": 2, "decoder_layer": 1}
        model = MiMo(dataclasses.replace(MiMoConfig.from_preset("mimo-tiny"), **small, **options)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        policy = recipe_type(model.config).history_policy(model.config)
        assert policy.conditions == expected
        x = torch.randn(2, model.config.tokens, model.config.channels)
        given = {"labels": torch.tensor([0, 1]) if "num_classes" in options else None}
        given |= {"actions": torch.tensor([0, 1]) if "num_actions" in options else None}
        seen = {}
        for name in ("labels", "actions", "neither"):
            told = (
                dict(given) if name == "neither" else given | {name: None if given[name] is None else given[name] + 1}
            )
            kept = seen[name] = []

            def attend(layer, q, k, v, kept=kept):
                kept.append(torch.stack([k, v]))
                return q

            with torch.no_grad():
                model.history_frame(x, 1, attend, timestep=policy.timestep, **told)
        for name in ("labels", "actions"):
            same = all(map(torch.equal, seen[name], seen["neither"]))
            assert same == (name not in expected)
