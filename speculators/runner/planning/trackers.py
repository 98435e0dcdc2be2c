"""Check that the experiment trackers of a training can start, hours before it does, without importing their packages.

What is not known here, such as an expired key, is reported when training starts. TensorBoard and Trackio write files of
this user and need nothing.
"""

from __future__ import annotations

import configparser
import importlib.util
import netrc
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from speculators.config.choices import Tracker
from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.packages import install_command
from speculators.runner import executors
from speculators.runner.planning.plan import State, Step
from speculators.timeouts import TRACKER_SECONDS

WANDB_URL = "https://api.wandb.ai"
WANDB_LOCAL_MODES = {"offline", "dryrun", "disabled", "shared-offline"}
"""Modes in which W&B needs no account."""


def check_trackers(config: Config, steps: Iterable[Step]) -> None:
    """Check the trackers of `train.trackers`, if a stage of this machine that trains will run.

    Their packages are checked with those of the executors.

    Raises:
        RecipeError: W&B has no credentials, or MLflow's server does not answer.
    """
    training = [s.node for s in steps if s.node.spec.trains and s.state in (State.run, State.waits)]
    if all(executors.is_remote(config, node.kind) for node in training):
        return
    trackers = config.train.trackers
    if Tracker.wandb in trackers and not wandb_can_start(os.environ):
        raise RecipeError(
            "train.trackers: wandb has no API key, so that the training would fail when it starts",
            f"`wandb login`; or set the environment variable WANDB_MODE=offline; or {_without(config, ['wandb'])}",
        )
    if Tracker.mlflow in trackers:
        _check_mlflow(config, os.environ.get("MLFLOW_TRACKING_URI", ""))


def wandb_can_start(environment: Mapping[str, str]) -> bool:
    """Whether W&B finds an API key where it looks for one, or needs none."""
    settings = _wandb_settings(environment)
    if environment.get("WANDB_MODE", settings.get("mode", "online")) in WANDB_LOCAL_MODES:
        return True
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if settings.get("api_key") or settings.get("identity_token_file"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or settings.get("base_url") or WANDB_URL).hostname or ""
    files = [environment["NETRC"]] if "NETRC" in environment else ["~/.netrc", "~/_netrc"]
    return any(_netrc_has(Path(file).expanduser(), host) for file in files)


def _wandb_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings of W&B for this user and, above them, for this directory."""
    system = Path(environment.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    parser = configparser.ConfigParser(default_section="default", interpolation=None)
    try:
        parser.read([system / "settings", "wandb/settings"])
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser.defaults())


def _netrc_has(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False


def _check_mlflow(config: Config, uri: str) -> None:
    """Raise RecipeError if `uri` names a server that does not accept a connection, or a database without its driver."""
    address = urlsplit(uri)
    if (not uri or address.scheme == "sqlite") and importlib.util.find_spec("sqlalchemy") is None:
        raise RecipeError(
            "train.trackers: mlflow needs the package sqlalchemy for a database on this machine",
            f"{install_command('mlflow')}; or set MLFLOW_TRACKING_URI; or {_without(config, ['mlflow'])}",
        )
    if address.scheme not in ("http", "https") or not address.hostname:
        return
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=TRACKER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"train.trackers: the MLflow server at MLFLOW_TRACKING_URI={uri} does not answer ({error})",
            "start it; or unset MLFLOW_TRACKING_URI for a database in this directory; or "
            + _without(config, ["mlflow"]),
        ) from None


def _without(config: Config, names: Iterable[str]) -> str:
    """The override that removes some of the trackers."""
    return f"train.trackers=[{','.join(t.name for t in config.train.trackers if t.name not in names)}]"
