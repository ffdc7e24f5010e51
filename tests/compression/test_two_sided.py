"""Metrics that go by gradients at outputs, against double sums, autograd and models in which they are exact."""

import copy
import math
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from support.interruption import interrupted
from support.models import padded_batches, tiny_gpt2, tiny_llama, token_batches
from support.samplers import SHAPES, second_moment, weight
from torch.nn.functional import cross_entropy

from zssvd_lightning import CompressionConfig, compress
from zssvd_lightning.compression import corrections as steps_of_corrections
from zssvd_lightning.compression.course import course
from zssvd_lightning.compression.engine import Compression
from zssvd_lightning.compression.gathering import gather
from zssvd_lightning.compression.phase import Phase
from zssvd_lightning.compression.pipeline import calibrate, plan
from zssvd_lightning.correction.steps import natural_lengths
from zssvd_lightning.errors import CalibrationError, ConfigError, LogitsError, NonFiniteError, ZeroGradientError
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.whitening.cholesky import Root, Whitening, safe_cholesky
from zssvd_lightning.whitening.metrics import METRICS, OUTPUT_DAMPING
from zssvd_lightning.whitening.moments import Moments
from zssvd_lightning.whitening.output_gradients import OUTPUT_GRADIENTS, TOP
from zssvd_lightning.whitening.spectrum import Spectrum, Step


def two_sided(A, B):
    return Whitening(Root(*safe_cholesky(A, "layer")), Root(*safe_cholesky(B, "layer")))


def gathered(model, batches, **settings):
    compression = Compression(model, CompressionConfig(**({"metric": "two_sided"} | settings)), progress=False)
    gather(compression, batches, Phase.CALIBRATE)
    return compression


@contextmanager
def watched(model, outputs):
    """Within the block, outputs of the layers are kept in `outputs`."""
    with ExitStack() as stack:
        for name in find_targets(model):
            handle = model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: outputs.update({name: output.requires_grad_()})
            )
            stack.callback(handle.remove)
        yield


def tiny_llama_of(seed):
    torch.manual_seed(seed)
    return tiny_llama()


def summed_loss(model, batch, outputs):
    """The loss as a sum over its terms, with the outputs of the layers kept in `outputs`."""
    with watched(model, outputs):
        logits, labels = model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_output_moment_is_that_of_the_gradients_of_the_summed_loss_at_the_tokens(build):
    model, batches = build().eval(), padded_batches()
    compression = gathered(copy.deepcopy(model), batches)
    expected = dict.fromkeys(compression.targets, 0)
    terms = 0
    for batch in batches:
        outputs = {}
        loss = summed_loss(model, batch, outputs)
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        mask = batch["attention_mask"].bool()
        for name, gradient in zip(outputs, gradients, strict=True):
            D = gradient[mask].double()
            expected[name] = expected[name] + D.T @ D
        terms += int((batch["labels"][:, 1:] != -100).sum())
    for name in compression.targets:
        B = compression.gathering.moments.output_moment(name)
        torch.testing.assert_close(B.double(), expected[name] / terms, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("side", ["sampled", "top_k"])
@pytest.mark.parametrize("vocabulary", [5, 200])
def test_draws_have_the_curvature_of_the_loss_as_their_second_moment(side, vocabulary):
    """That of `-log p` by the logits is `diag(p) - p p^T`, from autograd; of the likeliest tokens alone for `top_k`."""
    logits = 3 * torch.randn(vocabulary).double()
    top = logits.topk(min(TOP, vocabulary))
    seen = logits if side == "sampled" else torch.full_like(logits, -torch.inf).scatter(0, top.indices, top.values)
    p = seen.softmax(-1)
    count = 40_000
    draws = OUTPUT_GRADIENTS[side](logits.expand(count, -1).clone(), torch.Generator().manual_seed(0))
    found, expected = draws.T @ draws / count, torch.diag(p) - torch.outer(p, p)
    assert (found - expected).norm() < 0.03
    assert draws.sum(-1).abs().max() < 1e-9
    if side == "sampled" and vocabulary == 5:
        hessian = torch.autograd.functional.hessian(lambda z: torch.logsumexp(z, -1), logits)
        torch.testing.assert_close(expected, hessian)


@pytest.mark.parametrize("side", ["sampled", "top_k"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_drawn_output_moments_are_those_of_what_is_sent_back_from_the_logits_that_count(build, side, monkeypatch):
    """With a draw of known v in place of the random one, against autograd; nothing else changes."""
    monkeypatch.setitem(OUTPUT_GRADIENTS, side, lambda logits, generator: logits.sin())
    model, batches = build().eval(), padded_batches()
    compression, without = (gathered(copy.deepcopy(model), batches, output_side=s) for s in (side, "empirical"))
    expected, terms = dict.fromkeys(compression.targets, 0), 0
    for batch in batches:
        outputs = {}
        with watched(model, outputs):
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        counts = batch["labels"][:, 1:] != -100
        gradients = torch.autograd.grad(logits[counts], list(outputs.values()), logits[counts].detach().sin())
        mask = batch["attention_mask"].bool()
        for name, gradient in zip(outputs, gradients, strict=True):
            D = gradient[mask].double()
            expected[name] = expected[name] + D.T @ D
        terms += int(counts.sum())
    moments, usual = compression.gathering.moments, without.gathering.moments
    for name in compression.targets:
        torch.testing.assert_close(moments.output_moment(name).double(), expected[name] / terms, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(moments.mean_gradient(name), usual.mean_gradient(name), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(moments.second_moment(name), usual.second_moment(name))
    assert moments.mean_loss == pytest.approx(usual.mean_loss)


@pytest.mark.parametrize("side", ["sampled", "top_k"])
def test_draws_are_the_same_again_and_others_in_the_next_batch(side):
    batch = token_batches(1)
    once, again, twice = (gathered(tiny_llama_of(0), batch * n, output_side=side).gathering.moments for n in (1, 1, 2))
    for name, B in once.output_sums.items():
        assert torch.equal(B, again.output_sums[name])
        assert not torch.allclose(2 * B, twice.output_sums[name])


class LossOfStates(torch.nn.Module):
    """Has a loss of its hidden states."""

    def __init__(self, returned):
        super().__init__()
        self.model = tiny_llama()
        self.returned = returned

    def forward(self, input_ids, labels, **rest):
        states = self.model.model(input_ids).last_hidden_state
        return SimpleNamespace(loss=states.square().mean(), **self.returned)


@pytest.mark.parametrize(
    ("returned", "message"),
    [({}, "logits are needed"), ({"logits": torch.ones(4, 24, 97)}, "set output_side to 'empirical'")],
)
def test_a_loss_that_does_not_come_from_logits_cannot_be_drawn_for(returned, message):
    with pytest.raises(LogitsError, match=message):
        gathered(LossOfStates(returned), token_batches(), output_side="sampled")


def test_statistics_of_another_output_side_do_not_serve():
    found = calibrate(tiny_llama(), token_batches(), CompressionConfig(metric="two_sided"), progress=False)
    config = CompressionConfig(metric="two_sided", output_side="top_k", corrections=0)
    with pytest.raises(CalibrationError, match="no top_k gradients"):
        compress(tiny_llama(), [], config, statistics=found, progress=False)


def test_nothing_is_watched_at_outputs_where_the_metric_does_not_need_it():
    assert gathered(tiny_llama(), token_batches(), metric="input").gathering.moments.output_sums == {}


def test_hooks_on_outputs_are_gone_afterwards():
    model = tiny_llama()
    gathered(model, token_batches())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("shape", SHAPES)
def test_half_of_what_is_dropped_is_the_curvature_where_gradients_do_not_depend_on_inputs(shape):
    """`1/2 mean (d^T dW x)^2` over all pairs of an input and a gradient."""
    m, n = shape
    X, D, W = torch.randn(40, n).double(), torch.randn(30, m).double(), weight(m, n)
    spectrum = Spectrum.of(W, two_sided(X.T @ X / 40, D.T @ D / 30))
    for k in range(1, min(shape) + 1):
        up, down = spectrum.factors(torch.arange(k))
        pairs = D @ (W - up @ down) @ X.T
        torch.testing.assert_close(
            0.5 * pairs.square().mean(), 0.5 * spectrum.sigma[k:].square().sum(), atol=1e-9, rtol=1e-9
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_changes_of_coordinates_on_both_sides_undo_each_other(shape):
    m, n = shape
    A, B, W, G = second_moment(n), second_moment(m), weight(m, n), weight(m, n)
    there = two_sided(A, B)
    torch.testing.assert_close(there.unwhiten(there.whiten(W)), W)
    torch.testing.assert_close((there.whiten(W) * there.whiten_gradient(G)).sum(), (W * G).sum())
    natural = there.unwhiten(there.whiten_gradient(G))
    torch.testing.assert_close(B @ natural @ A, G)


@pytest.mark.parametrize("side", [Root(), Root(torch.tensor([1.0, 2.0, 0.5])), Root(torch.eye(3).tril() * 2)])
def test_roots_of_every_form(side):
    M = torch.randn(4, 3)
    torch.testing.assert_close(side.over(side.times(M)), M)
    S = side.times(torch.eye(3))
    torch.testing.assert_close(side.over_transposed(M) @ S.T, M)


def test_sensitivity_in_the_two_sided_metric_is_still_the_derivative_of_the_loss():
    W, G = weight(6, 4), weight(6, 4)
    spectrum = Spectrum.of(W, two_sided(second_moment(4), second_moment(6)))
    for i, delta in enumerate(spectrum.sensitivities(G)):
        up, down = spectrum.factors(torch.tensor([i]))
        torch.testing.assert_close(-(G * (up @ down)).sum(), delta)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_natural_step_ends_where_the_metric_finds_it_nearest_to_the_original(shape):
    """Of all along `B^-1 G A^-1`, distances being those of the metric; a brute-force search finds no nearer."""
    m, n = shape
    A, B, W, G, original = second_moment(n), second_moment(m), weight(m, n), weight(m, n), weight(m, n)
    whitening, reach = two_sided(A, B), -float((G * (original - W)).sum().abs())
    original = original if (G * (original - W)).sum() < 0 else 2 * W - original
    square = float(whitening.whiten_gradient(G).square().sum())
    projected = natural_lengths({"W": reach}, {"W": square}, radius=-reach / math.sqrt(square))["W"]
    assert projected == pytest.approx(reach / square)
    up, down = Spectrum.of(W, whitening, G, Step(projected)).factors(torch.arange(min(shape)))
    natural = torch.linalg.solve(B, torch.linalg.solve(A, G.T).T)

    def distance(V):
        return torch.einsum("ij,ik,kl,jl->", original - V, B, original - V, A)

    length = ((up @ down - W) * natural).sum() / natural.square().sum()
    torch.testing.assert_close(up @ down, W + length * natural)
    nearest = distance(up @ down) * (1 - 1e-9)  # less what is lost to rounding
    assert all(nearest <= distance(W + t * length * natural) for t in torch.linspace(-1, 3, 41))


def test_each_metric_takes_the_sides_it_says():
    moments = gathered(tiny_llama(), token_batches()).gathering.moments
    name = "model.layers.0.mlp.down_proj"
    A, B = moments.second_moment(name).double(), moments.output_moment(name).double()
    roots = {metric: Whitening(m.inputs(moments, name), m.outputs(moments, name)) for metric, m in METRICS.items()}
    assert roots["none"] == Whitening()
    torch.testing.assert_close(roots["rows"].outputs.S.square(), B.diagonal())
    assert roots["rows"].inputs.S is roots["diagonal"].outputs.S is roots["input"].outputs.S is None
    torch.testing.assert_close(roots["diagonal"].inputs.S, A.diagonal().sqrt().sqrt())
    torch.testing.assert_close(roots["input"].inputs.S @ roots["input"].inputs.S.T, A, rtol=1e-6, atol=1e-9)
    R = roots["two_sided"].outputs.S
    damped = B + OUTPUT_DAMPING * B.diagonal().mean() * torch.eye(len(B))
    torch.testing.assert_close(R @ R.T, damped)


@pytest.mark.parametrize(
    ("sums", "error"),
    [
        ({}, ZeroGradientError),
        ({"x": torch.zeros(2, 2)}, ZeroGradientError),
        ({"x": torch.full((2, 2), torch.inf)}, NonFiniteError),
    ],
)
def test_outputs_without_a_usable_gradient_are_named(sums, error):
    with pytest.raises(error, match="output of x"):
        Moments(output_sums=sums, loss_terms=3.0).output_moment("x")


KEPT = {
    "metric": "two_sided",
    "selection": "curvature",
    "correction_step": "natural",
    "fresh_moments": False,
    "correction_batches": 1,
}


def test_kept_second_moments_are_those_of_the_first_calibration():
    config = CompressionConfig(0.4, **KEPT, corrections=3)
    assert [step.gathers for step in course(config)] == [Phase.CALIBRATE] + [Phase.CORRECT] * 3
    model, batches, name = tiny_llama(), token_batches(), "model.layers.0.mlp.up_proj"
    compression = Compression(model, config, progress=False)
    gather(compression, batches, Phase.CALIBRATE)
    A, B = (getattr(compression.gathering.moments, moment)(name) for moment in ("second_moment", "output_moment"))
    for number, step in enumerate(course(config)):
        if number > 0:
            gather(compression, batches, step.gathers)
        compression.gathering.complete()
        _, seen = compression.gathering.layer_at(0, name, inputs=True)
        torch.testing.assert_close(seen.second_moment(name), A)
        torch.testing.assert_close(seen.output_moment(name), B)
        compression.take(step)
    assert len(compression.losses) == 4
    compression.factorize()
    assert compression.gathering.moments.input_sums == {}


def test_natural_steps_are_as_long_together_as_the_radius_and_none_goes_uphill():
    reaches, squares = {"a": -2.0, "b": -1.0, "c": 3.0}, {"a": 4.0, "b": 9.0, "c": 1.0}
    lengths = natural_lengths(reaches, squares, radius=0.1)
    assert math.sqrt(sum(t * t * squares[name] for name, t in lengths.items())) == pytest.approx(0.1)
    assert lengths["a"] / lengths["b"] == pytest.approx((2.0 / 4.0) / (1.0 / 9.0))
    assert lengths["a"] < 0 == lengths["c"]
    assert natural_lengths({"a": 1.0}, {"a": 1.0}, 0.1) == {"a": 0.0}


@pytest.mark.parametrize(("number", "corrections", "part"), [(1, 1, 1.0), (2, 2, 0.5), (2, 4, 0.75)])
def test_a_natural_step_follows_the_fresh_gradient_in_the_metric_of_the_calibration(
    monkeypatch, number, corrections, part
):
    """With little dropped at its end it leaves `W + part t B^-1 G A^-1`, t being settled at the first step."""
    monkeypatch.setattr(steps_of_corrections, "trusted_radius", lambda radius, _: radius)
    monkeypatch.setattr(steps_of_corrections, "LONGEST", math.inf)
    config = CompressionConfig(
        0.02, **KEPT | {"storage": "pivoted", "step_radius": 0.1, "rank_multiple": 1}, corrections=corrections
    )
    model, batches = tiny_llama().double(), token_batches()
    first = gathered(copy.deepcopy(model), batches).gathering.moments
    compression = Compression(model, config, progress=False)
    gather(compression, batches, Phase.CALIBRATE)
    compression.take(course(config)[0])
    for step in course(config)[1:number]:
        gather(compression, batches, step.gathers)
        compression.take(step)
    known = compression.first_steps
    gather(compression, batches, Phase.CORRECT)
    before = {
        name: (target.weight.clone(), compression.gathering.moments.mean_gradient(name))
        for name, target in compression.targets.items()
    }
    compression.take(course(config)[number])
    assert known == (None if number == 1 else compression.first_steps)
    lengths = {name: step.factor for name, step in compression.first_steps.items()}
    name = min((n for n, layer in compression.report().layers.items() if layer.rank is not None), key=lengths.get)
    W, G = before[name]
    assert lengths[name] < 0
    sides = METRICS["two_sided"]
    A, B = (root.S @ root.S.T for root in (sides.inputs(first, name), sides.outputs(first, name)))
    natural = torch.linalg.solve(B, torch.linalg.solve(A, G.T).T)
    expected = W + part * lengths[name] * natural
    step, found = expected - W, compression.targets[name].weight - W
    assert (step * found).sum() >= 0.95 * step.norm() * found.norm()
    assert found.norm() == pytest.approx(float(step.norm()), rel=0.1)


@pytest.mark.parametrize("statistics", [True, False])
def test_kept_second_moments_are_in_what_is_saved_also_between_hooks(statistics):
    interrupted(CompressionConfig(0.4, **KEPT, corrections=2), token_batches(), statistics)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("step", ["projected", "natural"])
def test_natural_and_projected_steps_with_fresh_or_kept_moments(step, fresh):
    report = compress(
        tiny_llama(),
        token_batches(),
        CompressionConfig(
            0.3, metric="two_sided", corrections=2, correction_step=step, fresh_moments=fresh, correction_batches=2
        ),
        progress=False,
    )
    assert report.reached >= 0.3
    expected = {("projected", True): 7, ("projected", False): 5, ("natural", True): 3, ("natural", False): 3}
    assert len(report.losses) == expected[step, fresh]


def test_several_truncations_approach_the_ratio_in_equal_parts(monkeypatch):
    reached = []
    truncate = Compression.truncate

    def noting(self):
        truncate(self)
        reached.append(self.report().reached)

    monkeypatch.setattr(Compression, "truncate", noting)
    report = compress(
        tiny_llama(), token_batches(), CompressionConfig(0.45, truncations=3, corrections=0), progress=False
    )
    assert reached == pytest.approx([0.15, 0.3, 0.45], abs=0.03)
    assert report.reached == reached[-1]
    assert len(report.losses) == 3


def test_every_round_of_corrections_takes_the_next_batches_of_those_not_kept_back():
    config = CompressionConfig(0.3, corrections=3, correction_batches=2, fresh_moments=False, line_search=True)
    model, batches = tiny_llama(), token_batches(4)
    seen = []

    def loss(model, batch):
        if torch.is_grad_enabled():  # the loss of batches kept back is measured without gradients
            seen.append(next(i for i, b in enumerate(batches) if b["input_ids"] is batch["input_ids"]))
        return model(**batch).loss

    compress(model, batches, config, progress=False, loss=loss)
    assert seen == [0, 1, 2, 3, *[1, 2] * 2, *[3, 1] * 2, *[2, 3] * 2]


def test_settings_that_do_not_go_together_are_refused():
    for settings, message in (
        ({"correction_step": "natural"}, "needs metric 'two_sided'"),
        ({"truncations": 2, "plan": "plan.yaml"}, "reached by one truncation"),
        ({"budget_in": "bytes", "storage": "remap", "rows_in_16_bits": "loss_aware"}, "does not count"),
    ):
        with pytest.raises(ConfigError, match=message):
            CompressionConfig(**settings)


def test_a_plan_is_for_the_whole_ratio_however_many_truncations_reach_it():
    config = CompressionConfig(0.45, truncations=3, corrections=0)
    assert plan(tiny_llama(), token_batches(), config, progress=False).reached == pytest.approx(0.45, abs=0.03)


def test_statistics_without_outputs_do_not_serve_a_metric_that_goes_by_them():
    found = calibrate(tiny_llama(), token_batches(), CompressionConfig(), progress=False)
    with pytest.raises(CalibrationError, match=r"no empirical gradients at the output of model\.layers\.0"):
        compress(tiny_llama(), [], CompressionConfig(metric="rows", corrections=0), statistics=found, progress=False)
