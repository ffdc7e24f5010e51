import pytest
import torch
from support.models import (
    FAMILIES,
    assert_same_state,
    padded_batches,
    state_of,
    tiny_gpt2,
    tiny_llama,
    token_batches,
)
from support.samplers import rows
from torch import nn

from zssvd_lightning._numerics import SMALL_SQUARE, SMALL_SQUARE_BFLOAT16, add_square
from zssvd_lightning.calibration.batches import loss_terms, token_mask
from zssvd_lightning.calibration.gradients import collect_gradients
from zssvd_lightning.calibration.hooks import observing
from zssvd_lightning.errors import CalibrationError, NonFiniteError, ZeroGradientError
from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.whitening.moments import Moments


def gather(model, batches):
    targets, moments = find_targets(model), Moments()
    for batch in batches:
        with observing(model, targets, moments, token_mask(batch)) as observation:
            loss = model(**batch).loss
            observation.forward_done()
            loss.backward()
            collect_gradients(targets, moments, loss_terms(batch))
            moments.add_loss(loss.item(), loss_terms(batch))
    return targets, moments


def seen_inputs(model, batches, names):
    """What each layer reads, position by position, without padding."""
    seen = {name: [] for name in names}
    mask = None

    def hook(name):
        return lambda module, args: seen[name].append(args[0].detach()[mask])

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    model.eval()
    for batch in batches:
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def test_second_moments_are_those_of_the_unpadded_tokens():
    model, batches = tiny_llama(), padded_batches()
    targets, moments = gather(model, batches)
    for name, X in seen_inputs(model, batches, targets).items():
        torch.testing.assert_close(moments.second_moment(name), X.T @ X / len(X), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [1, SMALL_SQUARE, SMALL_SQUARE + 1, 3 * SMALL_SQUARE - 1])
def test_squares_made_in_blocks_are_whole(n):
    X, Y = rows(7, n), rows(40, n)
    total = torch.zeros(n, n, dtype=torch.float64)
    add_square(total, X)
    add_square(total, Y)
    torch.testing.assert_close(total, X.T @ X + Y.T @ Y)


@pytest.mark.parametrize("n", [5, SMALL_SQUARE_BFLOAT16 + 1])
def test_squares_of_numbers_in_bfloat16_are_as_exact_as_in_float32(n):
    X = rows(40, n).bfloat16()
    total = torch.zeros(n, n)
    add_square(total, X, weight=3.0)
    exact = 3.0 * X.double().T @ X.double()
    torch.testing.assert_close(total.double(), exact, rtol=0, atol=1e-6 * float(exact.max()))


def test_layers_that_read_one_tensor_share_one_second_moment():
    targets, moments = gather(tiny_llama(), token_batches())
    assert len(targets) == 14
    assert len(moments.input_sums) == 8
    leaders = {name.split(".", 3)[-1]: leader.split(".", 3)[-1] for name, leader in moments.leaders.items()}
    assert leaders["self_attn.k_proj"] == leaders["self_attn.v_proj"] == "self_attn.q_proj"
    assert leaders["mlp.up_proj"] == "mlp.gate_proj"
    assert leaders["self_attn.o_proj"] == "self_attn.o_proj"


def test_mean_gradient_is_that_of_the_mean_loss_over_all_tokens():
    model, batches = tiny_llama().eval(), padded_batches()
    targets, moments = gather(model, batches)
    total = sum(model(**b).loss * loss_terms(b) for b in batches) / sum(loss_terms(b) for b in batches)
    total.backward()
    for name, target in targets.items():
        torch.testing.assert_close(moments.mean_gradient(name), target.gradient, rtol=1e-3, atol=1e-7)
    assert moments.mean_loss == pytest.approx(total.item(), rel=1e-5)


def test_statistics_do_not_depend_on_how_tokens_are_batched():
    model, batches = tiny_llama(), padded_batches()
    halves = [{k: v[rows] for k, v in b.items()} for b in batches for rows in (slice(0, 1), slice(1, 4))]
    (targets, whole), (_, split) = gather(model, batches), gather(model, halves)
    for name in targets:
        torch.testing.assert_close(whole.second_moment(name), split.second_moment(name), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(whole.mean_gradient(name), split.mean_gradient(name), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_as_before_after_observing(family):
    model = FAMILIES[family].build()
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = state_of(model)
    gather(model, FAMILIES[family].batches())
    assert_same_state(before, state_of(model))


def test_everything_is_as_before_after_an_error():
    model = tiny_gpt2()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="boom"), observing(model, find_targets(model), Moments(), None):
        assert not model.training
        assert not model.config.use_cache
        raise RuntimeError("boom")
    assert_same_state(before, state_of(model))


def test_dropout_is_off_and_mode_is_restored():
    model = tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.5).train()
    (targets, one), (_, other) = gather(model, token_batches()), gather(model, token_batches())
    for name in targets:
        assert torch.equal(one.mean_gradient(name), other.mean_gradient(name))
    assert all(m.training for m in model.modules())


def test_inputs_are_summed_in_float32_under_autocast():
    model, batch = tiny_llama(), token_batches(1)[0]
    targets, moments = find_targets(model), Moments()
    with torch.autocast("cpu", torch.bfloat16), observing(model, targets, moments, None):
        model(**batch)
    for name, leader in moments.leaders.items():
        if name == leader:
            assert moments.input_sums[name].dtype == torch.float32
            torch.linalg.cholesky(moments.second_moment(name).double() + 1e-7 * torch.eye(targets[name].shape[1]))


@pytest.mark.parametrize(
    ("shape", "rows"), [((2, 4, 3), 5), ((8, 3), 5), ((4, 2, 3), 5), ((2, 3), 2), ((2, 4, 2, 3), 16)]
)
def test_mask_applies_where_the_input_has_its_shape(shape, rows):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    model, moments = nn.Linear(3, 3), Moments()
    with observing(model, find_targets(nn.Sequential(model)), moments, mask):
        model(torch.randn(shape))
    assert list(moments.tokens.values()) == [rows]


def test_second_moments_are_exact_whatever_the_matmul_precision():
    X = torch.randn(512, 64)
    linear, moments = nn.Linear(64, 64), Moments()
    torch.set_float32_matmul_precision("medium")
    try:
        with observing(linear, find_targets(nn.Sequential(linear)), moments, None):
            linear(X)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(moments.second_moment("0"), X.T @ X / 512, rtol=1e-5, atol=1e-5)


def test_forward_passes_after_the_first_are_not_counted():
    model, batch = tiny_llama(), token_batches(1)[0]
    moments = Moments()
    with observing(model, find_targets(model), moments, None) as observation:
        model(**batch)
        observation.forward_done()
        model(**batch)
    assert set(moments.tokens.values()) == {batch["input_ids"].numel()}


def test_all_padding_is_refused():
    batch = token_batches(1)[0]
    batch["attention_mask"].zero_()
    model = tiny_llama()
    with (
        pytest.raises(CalibrationError, match="all padding"),
        observing(model, find_targets(model), Moments(), token_mask(batch)),
    ):
        pass


def test_layers_that_stop_sharing_are_refused_by_name():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.apart = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x):
            return self.a(x) + self.b(x + 1 if self.apart else x)

    model, moments = Fork(), Moments()
    with observing(model, find_targets(model), moments, None):
        model(torch.randn(3, 4))
    model.apart = True
    with (
        pytest.raises(CalibrationError, match="b read the same input as a"),
        observing(model, find_targets(model), moments, None),
    ):
        model(torch.randn(3, 4))


def test_a_layer_that_never_ran_is_named():
    with pytest.raises(CalibrationError, match=r"blocks\.7\.q_proj never ran"):
        Moments().second_moment("blocks.7.q_proj")


def test_infinite_activations_are_named():
    moments = Moments(leaders={"q": "q"})
    moments.add_inputs("q", torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(NonFiniteError, match="inputs of q"):
        moments.second_moment("q")


def test_zero_and_infinite_gradients_are_named():
    moments = Moments(loss_terms=1)
    moments.add_gradient("q", torch.zeros(2, 2))
    with pytest.raises(ZeroGradientError, match="at q"):
        moments.mean_gradient("q")
    moments.add_gradient("k", torch.full((2, 2), float("nan")))
    with pytest.raises(NonFiniteError, match="gradient at k"):
        moments.mean_gradient("k")


@pytest.mark.parametrize(
    ("batch", "terms"),
    [
        ({"labels": torch.tensor([[5, 6, -100], [7, -100, -100]]), "input_ids": torch.zeros(2, 3)}, 1),
        ({"labels": torch.tensor([[5, 6, -100], [7, -100, -100]]), "input_ids": torch.zeros(2, 9)}, 3),
        ({"labels": torch.tensor([[1.0], [2.0]])}, 2),
        ({"labels": torch.tensor([1, 0, 2])}, 3),
        ({"x": torch.zeros(4, 2)}, 4),
        ((torch.zeros(6, 2), torch.zeros(6)), 6),
        (torch.zeros(2, 3), 2),
    ],
)
def test_loss_terms(batch, terms):
    assert loss_terms(batch) == terms


@pytest.mark.parametrize("batch", [{"labels": torch.full((2, 3), -100)}, {"name": "x"}, 3])
def test_batches_without_a_term_are_refused(batch):
    with pytest.raises(CalibrationError):
        loss_terms(batch)
