import pytest
import torch
from support.models import tiny_bert, tiny_gpt2, token_batches
from support.samplers import SHAPES, second_moment, weight
from torch.nn.functional import cross_entropy

from zssvd_lightning.model.targets import find_targets
from zssvd_lightning.whitening.cholesky import Root, Whitening, safe_cholesky
from zssvd_lightning.whitening.spectrum import Spectrum


def whitening(A):
    return Whitening(Root(*safe_cholesky(A, "layer")))


WHITENINGS = {"input": lambda n: whitening(second_moment(n)), "none": lambda n: Whitening()}


@pytest.mark.parametrize("metric", WHITENINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_components_together_are_the_weight(shape, metric):
    W = weight(*shape)
    up, down = Spectrum.of(W, WHITENINGS[metric](shape[1])).factors(torch.arange(min(shape)))
    torch.testing.assert_close(up @ down, W)


@pytest.mark.parametrize("shape", SHAPES)
def test_sensitivity_is_the_formula_of_the_paper(shape):
    W, G, A = weight(*shape), weight(*shape), second_moment(shape[1])
    L = torch.linalg.cholesky(A)
    U, sigma, Vh = torch.linalg.svd(W @ L, full_matrices=False)
    H = torch.linalg.solve(L, G.T).T  # G L^-T
    expected = -sigma * torch.einsum("mi,mn,in->i", U, H, Vh)
    delta = Spectrum.of(W, Whitening(Root(L))).sensitivities(G)
    torch.testing.assert_close(delta, expected)


@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
def test_sensitivity_is_the_derivative_of_the_loss_towards_dropping_the_component(build):
    model, ids = build().double().eval(), token_batches(1)[0]["input_ids"]

    def loss():
        return cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten())

    loss().backward()
    targets = find_targets(model)
    for name in list(targets)[::5]:
        target = targets[name]
        W = target.weight.clone()
        spectrum = Spectrum.of(W, whitening(second_moment(W.shape[1])))
        delta = spectrum.sensitivities(target.gradient)
        for i in (0, len(delta) // 2, len(delta) - 1):
            up, down = spectrum.factors(torch.tensor([i]))
            losses = []
            for step in (1e-4, -1e-4):
                target.assign(W - step * up @ down)
                with torch.no_grad():
                    losses.append(loss())
            target.assign(W)
            slope = (losses[0] - losses[1]) / 2e-4
            torch.testing.assert_close(slope, delta[i], atol=1e-10, rtol=1e-5)


def test_sensitivities_add_up_to_minus_the_inner_product_of_weight_and_gradient():
    W, G = weight(8, 5), weight(8, 5)
    delta = Spectrum.of(W, whitening(second_moment(5))).sensitivities(G)
    torch.testing.assert_close(delta.sum(), -(W * G).sum())


def test_half_precision_weights_are_decomposed_in_float32():
    W = torch.randn(6, 4, dtype=torch.bfloat16)
    spectrum = Spectrum.of(W, whitening(second_moment(4)))
    assert spectrum.sigma.dtype == torch.float32
    up, down = spectrum.factors(torch.arange(4))
    torch.testing.assert_close(up @ down, W.float(), atol=1e-4, rtol=1e-4)
