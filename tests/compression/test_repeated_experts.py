"""Experts that are called with the tokens once for each, as in Llama 4, which are recognized by their structure."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callbacks import short
from support.experts import experts_in, tiny_llama4
from support.models import CausalLM, padded_batches, token_batches, trainer
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from zssvd_lightning import compress, from_pretrained, load_state_dict, merge, save_pretrained
from zssvd_lightning.compression.pipeline import calibrate
from zssvd_lightning.errors import TargetError
from zssvd_lightning.layers.apart.experts import ExpertList, is_stacked
from zssvd_lightning.model.apart.experts import EXPERTS
from zssvd_lightning.serialization.specs import ranks_of

QUICK = {"preset": "zs-svd", "prune_ratio": 0.4, "progress": False, "corrections": 0}
COUNT, TOP = 4, 2


def repeated(tokens=24, chosen=TOP):
    """Tokens once for each expert, with zeros where it is not chosen."""
    is_chosen = torch.stack([torch.randperm(COUNT) < chosen for _ in range(tokens)])
    return torch.randn(tokens, 32).repeat(COUNT, 1) * is_chosen.T.reshape(-1, 1)


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_separate_experts_compute_the_same_forward_and_backward():
    stacked = experts_in(tiny_llama4())[0]
    assert is_stacked(stacked)
    assert EXPERTS.difference(stacked, ExpertList(stacked)) is None
    separate, outputs, gradients = ExpertList(stacked), [], []
    x = repeated().requires_grad_()
    for module in (stacked, separate):
        outputs.append(module(x))
        outputs[-1].square().sum().backward()
        gradients.append(x.grad)
        x.grad = None
    assert outputs[0].std() > 0.1
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    for number, expert in enumerate(separate.experts):
        for name, layer in expert.named_children():
            expected = getattr(stacked, name).grad[number].T
            torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-3, atol=1e-3)
    again = separate.stacked()
    assert type(again) is type(stacked)
    assert vars(again).keys() == vars(stacked).keys()
    assert torch.equal(again(x), stacked(x))


def test_a_module_of_this_structure_that_computes_otherwise_stays_as_it_is():
    stacked = experts_in(tiny_llama4())[0]
    stacked.act_fn = nn.Sigmoid()
    assert EXPERTS.difference(stacked, ExpertList(stacked)) is None

    class Summed(type(stacked)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    stacked.__class__ = Summed
    assert "other outputs" in EXPERTS.difference(stacked, ExpertList(stacked))

    class WithTwoArguments(type(stacked)):
        def forward(self, hidden_states, other):
            return hidden_states

    stacked.__class__ = WithTwoArguments
    assert not is_stacked(stacked)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_compressed_saved_loaded_generated_and_merged(storage, tmp_path):
    model, batches = tiny_llama4(), token_batches()
    dense = copy.deepcopy(model)
    report = compress(model, batches, storage=storage, **QUICK)
    assert report.reached >= 0.4
    assert sum(".experts." in name for name in report.layers) == 2 * COUNT * 2
    assert any(".experts." in name for name in ranks_of(model))
    assert not any("stacked" in part.what or "experts" in part.what for part in report.coverage.left_alone)
    expected = logits(model, batches[0])
    for module in model.modules():
        if isinstance(module, ExpertList):
            x = repeated()
            with torch.no_grad():
                torch.testing.assert_close(module(x), module.one_by_one(x, *module._by_place(x)), rtol=1e-4, atol=1e-5)
            assert module._stacks is not None
    for self_contained in (False, True):
        save_pretrained(model, tmp_path / "saved", report=report, self_contained=self_contained)
        loaded = from_pretrained(tmp_path / "saved")
        assert ranks_of(loaded) == ranks_of(model)
        assert torch.equal(logits(loaded, batches[0]), expected)
    prompt = batches[0]["input_ids"][:, :5]
    generated = loaded.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(prompt, max_new_tokens=4, do_sample=False))
    fresh = tiny_llama4()
    load_state_dict(fresh, model.state_dict())
    assert torch.equal(logits(fresh, batches[0]), expected)
    load_state_dict(fresh, dense.state_dict())
    assert torch.equal(logits(fresh, batches[0]), logits(dense, batches[0]))
    merge(loaded)
    assert all(type(module) is type(other) for module, other in zip(experts_in(loaded), experts_in(dense), strict=True))
    torch.testing.assert_close(logits(loaded, batches[0]), expected, rtol=1e-3, atol=1e-5)
    loaded.save_pretrained(tmp_path / "dense")
    again = type(loaded).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(again, batches[0]), expected, rtol=1e-3, atol=1e-5)


def test_statistics_are_of_the_tokens_that_an_expert_gets_without_padding():
    model, batches = tiny_llama4(), padded_batches()
    name, seen = "model.layers.0.feed_forward.experts", []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    for batch in batches:
        logits(model, batch)
    hook.remove()
    moments = calibrate(model, batches, **QUICK)
    for number in range(COUNT):
        layer, rows = f"{name}.{number}.gate_up_proj", []
        for x, batch in zip(seen, batches, strict=True):
            own = x.view(COUNT, -1, x.shape[1])[number]
            rows.append(own[batch["attention_mask"].flatten().bool() & own.ne(0).any(1)])
        X = torch.cat(rows)
        assert 0 < len(X) < sum(len(x) for x in seen) / COUNT
        assert moments.tokens[layer] == len(X)
        torch.testing.assert_close(moments.input_sums[layer], X.T @ X, rtol=1e-4, atol=1e-5)


def test_a_fit_resumes_to_the_same_weights(tmp_path):
    def fit(module, *callbacks, ckpt_path=None):
        batches = StatefulDataLoader(padded_batches(14), batch_size=None)
        run = short(prune_ratio=0.4, preset="zs-svd-line-search", calibration_batches=4, start_step=2)
        given = {"max_steps": 14, "enable_checkpointing": True}
        trainer(run, *callbacks, **given).fit(module, batches, ckpt_path=ckpt_path)

    whole = CausalLM(tiny_llama4())
    start = copy.deepcopy(whole)
    fit(whole, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    assert any(".experts." in name for name in ranks_of(whole))
    for step in (1, 4, 12):
        resumed = copy.deepcopy(start)
        fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items()), step


def test_block_by_block_gives_the_same():
    models = [tiny_llama4(), tiny_llama4()]
    for model, memory in zip(models, ("whole", "blocks"), strict=True):
        compress(model, padded_batches(), memory=memory, **QUICK)
    assert ranks_of(models[0]) == ranks_of(models[1])
    batch = token_batches(1)[0]
    torch.testing.assert_close(logits(models[1], batch), logits(models[0], batch), rtol=1e-3, atol=1e-4)


def test_removal_is_refused_with_the_reason():
    settings = {"metric": "two_sided", "selection": "curvature", "remove_experts": True}
    with pytest.raises(TargetError, match="does not return logits, weights and numbers of experts"):
        compress(tiny_llama4(), token_batches(), **QUICK | settings)
