"""Adapter for a strategy that keeps a running mean of the weights, and must forget those of replaced layers."""

from lightning.pytorch.strategies import SingleDeviceStrategy

from zssvd_lightning.strategies import ADAPTERS, SingleDeviceAdapter


class AveragingStrategy(SingleDeviceStrategy):
    """Strategy on one device with a mean of each weight, by parameter."""

    def optimizer_step(self, *args, **kwargs):
        """Take a step, and move the means a tenth of the way to the new weights."""
        self.means = getattr(self, "means", {})
        result = super().optimizer_step(*args, **kwargs)
        for p in self.model.parameters():
            self.means[p] = p.detach().lerp(self.means.get(p, p).detach(), 0.9)
        return result


class AveragingAdapter(SingleDeviceAdapter):
    """Adapter that drops the means of parameters that are no longer there."""

    serves = (AveragingStrategy,)

    def rebuild_optimizers(self):
        """Set up new optimizers, and keep the means of the parameters that are left."""
        super().rebuild_optimizers()
        means, there = getattr(self.trainer.strategy, "means", {}), set(self.module.parameters())
        self.trainer.strategy.means = {p: mean for p, mean in means.items() if p in there}


ADAPTERS.register("averaging", AveragingAdapter)
