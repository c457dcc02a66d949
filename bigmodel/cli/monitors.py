"""Early check of the metrics that callbacks monitor."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer

from bigmodel.data.text import did_you_mean
from bigmodel.training.callbacks import Checkpoint


class CheckMonitors(Callback):
    """Refuses a misspelt `monitor` after the validation batches that precede training, not after the first epoch.

    Misspelt is a name that has not been logged and resembles one that has. A name that resembles none may be logged
    later: the callback itself refuses it if it is not.

    Args:
        named: the callbacks by their name in the configuration.
    """

    def __init__(self, named: Mapping[str, Callback]) -> None:
        self.named = named

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = [str(name) for name in trainer.callback_metrics]
        for name, callback in self.named.items():
            monitor = getattr(callback, "monitor", None)
            if not isinstance(monitor, str) or monitor in logged:
                continue
            if isinstance(callback, Checkpoint) and monitor == "val/loss":  # the default: it chooses another
                continue
            if hint := did_you_mean(monitor, logged, cutoff=0.8):
                names = ", ".join(logged)
                raise ValueError(
                    f"--callbacks.{name}.monitor {monitor}: validation does not log this metric, but {names}{hint}"
                )
