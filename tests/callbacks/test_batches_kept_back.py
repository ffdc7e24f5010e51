"""Batches kept back in a fit: their loss is measured without traces, and corrections that raise it are taken back."""

import copy
import math
import pickle

import lightning as L
import pytest
import torch
from support.callbacks import short
from support.models import CausalLM, loader, tiny_llama, token_batches, trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from zssvd_lightning import ZSSVDCallback
from zssvd_lightning.callbacks.trainer.replay import Replay, copied
from zssvd_lightning.compression import corrections
from zssvd_lightning.compression.safeguard import Safeguard
from zssvd_lightning.errors import DivergedError
from zssvd_lightning.strategies import SingleDeviceAdapter


def best(**settings):
    given = {"preset": "best", "corrections": 2, "correction_batches": 2, "calibration_batches": 8, "prune_ratio": 0.4}
    return short(**given | settings)


def test_the_report_has_the_losses_that_the_model_has_on_the_batches_kept_back():
    batches = token_batches(32)
    model = tiny_llama().eval()
    dense = [float(model(**batch).loss) for batch in batches[:2]]
    callback = best()
    trainer(callback).fit(CausalLM(model, lr=0.0), loader(batches))
    kept = callback.report.kept_back
    assert kept["batches"] == 2
    assert kept["dense"] == pytest.approx(sum(dense) / 2, rel=1e-5)
    after = [float(model.eval()(**batch).loss) for batch in batches[:2]]
    assert kept["final"] == pytest.approx(sum(after) / 2, rel=1e-5)
    assert kept["final"] <= kept["truncated"]


class Fitted(L.LightningModule):
    """A classifier that fits its points, trained no further."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        labels = torch.arange(40) % 10
        centers = torch.randn(10, 32)
        self.batches = [(centers[labels] + 0.1 * torch.randn(40, 32), labels) for _ in range(8)]
        optimizer = torch.optim.Adam(self.parameters(), 3e-3)
        for _ in range(30):
            for batch in self.batches:
                optimizer.zero_grad()
                self.training_step(batch, 0).backward()
                optimizer.step()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize("limits", [{"max_epochs": 1}, {"max_epochs": 5, "max_steps": 8}])
def test_a_destroyed_model_is_an_error_where_the_fit_ends_with_the_truncation(limits):
    module = Fitted()
    before = copy.deepcopy(module.net)
    callback = short(preset="zs-svd", metric="none", corrections=0, prune_ratio=0.95, calibration_batches=8)
    with pytest.raises(DivergedError, match="the model is as it was"):
        trainer(callback, **limits).fit(module)
    assert [type(layer) for layer in module.net] == [type(layer) for layer in before]
    for name, value in module.net.state_dict().items():
        assert torch.equal(value, before.state_dict()[name])


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 9}])
def test_a_destroyed_model_is_warned_of_where_training_goes_on(limits, caplog):
    callback = short(preset="zs-svd", metric="none", corrections=0, prune_ratio=0.95, calibration_batches=8)
    trainer(callback, **limits).fit(Fitted())
    assert callback.report.kept_back["final"] > 10 * callback.report.kept_back["dense"]
    assert "or train the factors (recovery)" in caplog.text


class Traced(L.LightningModule):
    """Everything that a second run of a training step could change."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))
        self.metric = MeanMetric()
        self.scored = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        x.add_(1.0)  # in place
        noise = torch.rand(()).item()
        loss = nn.functional.cross_entropy(self.net(x + 0 * noise), y)
        self.metric(loss)
        self.log("loss", loss, prog_bar=True)
        self.log_dict({"noise": noise})
        return {"loss": loss, "size": len(x)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 64 * 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(16, generator=generator)
        return x, int(x[:4].argmax())


class Counting(ZSSVDCallback):
    def loss_terms(self, batch):
        return len(batch[1])

    def token_mask(self, batch):
        return None


def test_a_batch_runs_again_without_traces():
    module, callback = Traced(), Counting(0.3)
    fitted = trainer(max_steps=2)
    fitted.fit(module, DataLoader(Points(), batch_size=64))
    adapter = SingleDeviceAdapter(fitted, module)
    batch = next(iter(DataLoader(Points(), batch_size=64)))
    kept = copied(batch)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    metric, logged, state = module.metric.compute().item(), dict(fitted.callback_metrics), torch.get_rng_state()
    replay = Replay(fitted, module, adapter, callback)
    module.train()
    first, second = replay(kept), replay(kept)
    assert first == second
    assert first[1] == 64
    assert torch.equal(kept[0], batch[0])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.metric.compute().item() == metric
    assert fitted.callback_metrics == logged
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in module.modules() if not isinstance(part, MeanMetric))
    assert "log" not in module.__dict__
    del fitted
    with pytest.raises(RuntimeError, match="not in this process"):
        pickle.loads(pickle.dumps(replay))(kept)


def test_a_fit_with_metrics_norms_and_dropout_goes_through():
    module, callback = (
        Traced(),
        Counting(0.3, schedule={"calibration_batches": 8}, correction_batches=2, progress=False),
    )
    trainer(callback, max_epochs=2).fit(module, DataLoader(Points(), batch_size=64))
    assert callback.phase == "done"
    assert callback.report.kept_back["batches"] == 2


def test_what_does_not_run_twice_is_said_and_the_fit_goes_on(caplog):
    class Once(CausalLM):
        def training_step(self, batch, batch_idx):
            if not torch.is_grad_enabled():
                raise ConnectionError("gone")
            return super().training_step(batch, batch_idx)

    callback = best()
    trainer(callback).fit(Once(tiny_llama()), loader(token_batches(24)))
    assert callback.phase == "done"
    assert callback.report.kept_back is None
    assert "(ConnectionError: gone), so that corrections are not checked" in caplog.text


def test_corrections_that_raise_the_loss_are_taken_back_in_a_fit(monkeypatch, caplog):
    from zssvd_lightning.whitening.spectrum import Step

    along = Step.along
    monkeypatch.setattr(Step, "along", lambda step, H: 1000.0 * along(step, H))
    model, batches = tiny_llama(), token_batches(2) * 12
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for batch in batches * 4:  # until it fits them: then a step too long does harm
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    callback = best()
    trainer(callback).fit(CausalLM(model, lr=0.0), loader(batches))
    kept = callback.report.kept_back
    assert kept["dense"] < 1.0
    assert kept["taken_back"] >= 1
    assert kept["final"] <= kept["truncated"]
    assert "was taken back" in caplog.text


class Saves(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("step", [2, 6, 9, 11])
def test_a_resumed_fit_compares_on_the_same_batches(tmp_path, step):
    model, batches = tiny_llama(), token_batches(1) * 24
    callback, resumed = best(), best()
    trainer(callback, Saves(tmp_path)).fit(CausalLM(copy.deepcopy(model), lr=0.0), loader(batches))
    module = CausalLM(copy.deepcopy(model), lr=0.0)
    trainer(resumed).fit(module, loader(batches), ckpt_path=tmp_path / f"{step}.ckpt")
    first, second = callback.report.kept_back, resumed.report.kept_back
    assert second == pytest.approx(first, rel=1e-5)


class Strange:
    """A batch that checkpoints cannot hold."""

    def __init__(self, batch):
        self.batch = batch

    def to(self, device):
        return self


class Wrapped(CausalLM):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch.batch, batch_idx)


class Reads(ZSSVDCallback):
    def token_mask(self, batch):
        return None

    def loss_terms(self, batch):
        return 1.0


def test_a_resumed_run_without_its_batches_says_that_it_does_not_compare(tmp_path, caplog):
    def callback():
        settings = {"preset": "best", "corrections": 2, "correction_batches": 2, "progress": False}
        return Reads(0.4, schedule={"calibration_batches": 8}, **settings)

    model, batches = tiny_llama(), [Strange(batch) for batch in token_batches(24)]
    first, again = callback(), callback()
    trainer(first, Saves(tmp_path)).fit(Wrapped(copy.deepcopy(model), lr=0.0), loader(batches))
    saved = torch.load(tmp_path / "9.ckpt", weights_only=True)["callbacks"][first.state_key]
    assert saved["compression"]["safeguard"]["batches"] == [None]
    trainer(again).fit(Wrapped(model, lr=0.0), loader(batches), ckpt_path=tmp_path / "9.ckpt")
    assert again.phase == "done"
    assert again.report.kept_back is None
    assert "the checkpoint has none" in caplog.text


def test_a_safeguard_without_measurements_says_nothing():
    assert Safeguard(lambda batch: (0.0, 1.0)).report() is None


def test_hooks_on_batches_and_other_names_of_the_index_are_respected():
    seen = []

    class Own(CausalLM):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch | {"count": batch.get("count", 0) + 1}

        def training_step(self, batch, _):
            seen.append(batch.pop("count"))
            return self.model(**batch).loss

    callback = best()
    trainer(callback).fit(Own(tiny_llama(), lr=0.0), loader(token_batches(24)))
    assert callback.report.kept_back is not None
    assert set(seen) == {1}


@pytest.mark.parametrize("step", [3, 9, 11])
def test_checkpoints_of_earlier_releases_go_on(tmp_path, monkeypatch, caplog, step):
    bounds = []
    monkeypatch.setattr(corrections, "trusted_radius", lambda radius, loss: bounds.append(loss) or radius)
    model, batches = tiny_llama(), token_batches(24)
    trainer(best(), Saves(tmp_path)).fit(CausalLM(copy.deepcopy(model), lr=0.0), loader(batches))
    checkpoint = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    for key in ("safeguard", "truncation_loss"):
        del state["compression"][key]
    lengths = state["compression"]["lengths"]
    state["compression"]["lengths"] = lengths and {name: step[0] for name, step in lengths.items()}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    callback = best()
    trainer(callback).fit(CausalLM(model, lr=0.0), loader(batches), ckpt_path=tmp_path / "old.ckpt")
    assert callback.phase == "done"
    assert (callback.report.kept_back is None) == ("the checkpoint has none" in caplog.text) == (step > 8)
    assert all(math.isfinite(bound) for bound in bounds) == (step != 9)  # 9: truncated before, and no step yet


def test_a_batch_that_cannot_be_copied_is_said(caplog):
    class Unique(Strange):
        def __deepcopy__(self, memo):
            raise TypeError("there is one of it")

    callback = Reads(0.3, schedule={"calibration_batches": 4}, correction_batches=2, progress=False)
    batches = [Unique(batch) for batch in token_batches(24)]
    trainer(callback).fit(Wrapped(tiny_llama(), lr=0.0), loader(batches))
    assert callback.phase == "done"
    assert "there is one of it" in caplog.text
