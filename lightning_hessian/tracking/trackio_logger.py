"""`TrackioLogger`: Trackio's dashboard for Lightning, which has no logger for it of its own."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

_INSTALL = "TrackioLogger needs Trackio: pip install 'lightning-hessian[trackio]'."


class TrackioLogger(Logger):
    """Log a Lightning run to Trackio: scalars, hyperparameters and pictures.

    Everything lies on this machine, where ``TRACKIO_DIR`` says or in Hugging Face's cache folder,
    and ``trackio show`` opens the dashboard; no account and no network are needed. With
    ``space_id`` or ``server_url`` Trackio sends it there. A run that is over is taken up again
    where more is logged, as ``trainer.test`` does after ``trainer.fit``. Trackio knows one run in
    a process: beginning another finishes the one before.

    Args:
        project: The project that the run stands in.
        name: Of the run; Trackio finds one where none is given.
        group: Of runs that belong together.
        prefix: Stands before each metric, joined by a hyphen as in Lightning's other loggers.
        resume: ``"never"``, ``"allow"`` or ``"must"``: whether a run of this name goes on.
        **settings: Further arguments of `trackio.init`, such as ``space_id``.

    Raises:
        ModuleNotFoundError: Trackio is not installed.

    Example:
        ::

            logger = TrackioLogger("digits", name="lenet")
            trainer = L.Trainer(logger=logger, callbacks=[HessianSpectrumCallback()])
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        project: str = "lightning_logs",
        *,
        name: str | None = None,
        group: str | None = None,
        prefix: str = "",
        resume: str = "never",
        **settings: Any,
    ) -> None:
        super().__init__()
        try:
            import trackio  # noqa: F401 - asked for before training, not in the middle of it
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(_INSTALL) from error
        self._project = project
        self._name = name
        self._prefix = prefix
        self._resume = resume
        self._config: dict[str, Any] = dict(settings.pop("config", None) or {})
        self._settings = {"group": group, **settings}
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project, under which Lightning puts checkpoints."""
        return self._project

    @property
    def version(self) -> str | None:
        """The name of the run; None before it begins where Trackio is to find one."""
        return self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `trackio.Run`, which begins when it is first asked for."""
        if self._run is None:
            import trackio

            self._run = trackio.init(
                self._project,
                name=self._name,
                resume=self._resume,
                config=self._config,
                **self._settings,
            )
            self._name, self._resume = self._run.name, "must"  # where it is taken up again
        return self._run

    @rank_zero_only
    def log_hyperparams(
        self, params: Mapping[str, Any] | Namespace | None, *args: Any, **kwargs: Any
    ) -> None:
        """Add hyperparameters to the configuration of the run."""
        given = vars(params) if isinstance(params, Namespace) else params or {}
        # Trackio keeps names with an underscore in front for itself.
        found = {str(key).lstrip("_"): _plain(value) for key, value in given.items()}
        self._config.update(found)
        if self._run is not None:
            self._run.config.update(found)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers in a row of their own."""
        self.experiment.log({self._key(key): value for key, value in metrics.items()}, step=step)

    @rank_zero_only
    def log_image(
        self, key: str, images: Sequence[Any], step: int | None = None, caption: Sequence[str] = ()
    ) -> None:
        """Log pictures (paths, arrays or PIL images) under one key, as `WandbLogger` does.

        Args:
            key: What they are called; of several each has its number behind it.
            images: The pictures.
            step: Of the run.
            caption: One for each.
        """
        import trackio

        found = {}
        for place, image in enumerate(images):
            name = key if len(images) == 1 else f"{key}_{place}"
            text = caption[place] if caption else None
            found[self._key(name)] = trackio.Image(image, caption=text)
        self.experiment.log(found, step=step)

    @rank_zero_only
    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """Log a text under a key."""
        self.experiment.log({self._key(key): text}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish the run: everything has been written when this returns."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _key(self, key: str) -> str:
        return f"{self._prefix}{self.LOGGER_JOIN_CHAR}{key}" if self._prefix else key


def _plain(value: Any) -> Any:
    """Return a hyperparameter as JSON knows it; what it does not know as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
