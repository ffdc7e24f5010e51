"""Compress, and train what is left, in one fit: `python -m recipes.compress_then_finetune CONFIG [key=value ...]`.

The dense model is then trained for as many steps on the same text, so that the report tells recovery from adaptation.
"""

import copy
from dataclasses import replace

from transformers import PreTrainedModel

from recipes.compress import CausalLM
from zssvd_lightning import Run, RunConfig, load_config
from zssvd_lightning._resources import Stopwatch
from zssvd_lightning.app.command import print_table, start
from zssvd_lightning.app.recovered import compress_and_train, trainer
from zssvd_lightning.errors import ConfigError
from zssvd_lightning.model.targets import find_targets, matches
from zssvd_lightning.recovery.methods import recovery_of
from zssvd_lightning.recovery.settings import Recovery


class FineTuned(CausalLM):
    """Trains, of a dense model, the layers that are low-rank in the other, and what is trained beside them there."""

    def __init__(self, model: PreTrainedModel, recovery: Recovery, run: Run) -> None:
        super().__init__(model)
        self.recovery = replace(recovery, lr=run.config.training.dense_lr or recovery.lr)
        settings = run.config.compression
        targets = find_targets(model, settings.include, settings.ignore)
        names = {f"{name}.{part}" for name in targets if recovery.chooses(name) for part in ("weight", "bias")}
        for name, parameter in model.named_parameters():
            beside = any(matches(name, pattern) for pattern in recovery.also_train)
            parameter.requires_grad_(name in names or beside)

    def configure_optimizers(self) -> dict:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return self.recovery.optimizer(trained, self.trainer.max_steps)


def checked(path: str, *overrides: str) -> tuple[RunConfig, Recovery]:
    config = load_config(RunConfig, path, overrides)
    recovery = recovery_of(config.recovery)
    if recovery is None:
        raise ConfigError(f"{path} has no recovery; set recovery.method, or run recipes/compress.py")
    if recovery.lr is None:
        raise ConfigError("recovery.lr is null, but there is no other optimizer in this recipe; set it")
    if not config.evaluation.texts and not config.evaluation.tasks:
        raise ConfigError("evaluation.text is null, so nothing would be measured; name a text, or tasks")
    return config, recovery


def main(path: str, *overrides: str) -> None:
    config, recovery = checked(path, *overrides)
    run, watch = Run(config), Stopwatch()
    dense = copy.deepcopy(run.model)
    run.evaluate("dense")
    report, steps = compress_and_train(run)

    with watch("finetune_dense"):
        trainer(run, steps).fit(FineTuned(dense, recovery, run), run.training_loader(steps))
    run.evaluate("dense_finetuned", dense)

    report.seconds |= watch.seconds
    run.save(report, picture=True)
    print_table(report.table())
    print(f"wrote the model, report.json, report.html and report.png to {run.output}")


if __name__ == "__main__":
    start(main, __doc__)
