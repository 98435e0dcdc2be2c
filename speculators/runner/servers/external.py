"""What a running vLLM server reports of itself, so that keys hold the same for it as for a server that is started.

A started server enters keys by vLLM's version; the target is an input of its stages. A running server reports its
version and the model that it serves. If that is recognizably the recipe's target, its fingerprint is the version alone,
and nothing runs again because another server is used. Otherwise the name of the model is in the fingerprint, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators.config.schema import Config
from speculators.errors import ServiceError
from speculators.packages import public_version
from speculators.runner.servers.server import external_api_key
from speculators.timeouts import HEALTH_CHECK_SECONDS


def fingerprint(config: Config, urls: Mapping[str, str], checkpoint: Path | None) -> dict[str, str]:
    """The fingerprint of running servers that share the work or are compared: `engine`, and `model` if it is unknown.

    `urls` has their URLs by the option that names each, `checkpoint` is the target's directory if it exists.

    Raises:
        ServiceError: one does not answer as vLLM does, or they are not alike; the message names its option.
    """
    key = external_api_key(config)
    fingerprints = {option: _fingerprint(config, option, url, key, checkpoint) for option, url in urls.items()}
    (first, expected), *others = fingerprints.items()
    for option, reported in others:
        if reported != expected:
            raise ServiceError(
                f"{option}={urls[option]}: serves {_text(reported)}, the server of {first} {_text(expected)}",
                "serve the same model with the same version of vLLM at both",
            )
    return expected


def _text(reported: Mapping[str, str]) -> str:
    return " ".join(filter(None, [reported.get("model", ""), f"with vLLM {reported['engine']}"]))


def _fingerprint(config: Config, option: str, url: str, key: str, checkpoint: Path | None) -> dict[str, str]:
    version, models = _get(option, url, "/version", key), _get(option, url, "/v1/models", key)
    try:
        engine, model = public_version(version["version"]), models["data"][0]
        name, root = str(model["id"]), str(model.get("root") or model["id"])
    except (LookupError, TypeError, AttributeError):
        raise ServiceError(
            f"{option}={url}: the server does not report a version and a model as vLLM does",
            f"{option}=URL of a server that `vllm serve` started",
        ) from None
    if _is_target(name, root, config.target.source, checkpoint):
        return {"engine": engine}
    return {"engine": engine, "model": root}


def _is_target(name: str, root: str, source: str, checkpoint: Path | None) -> bool:
    """Whether a served model, by its name or the path `root` of its files, is the recipe's target.

    A directory is the same one; a hub model is known by its name, which a copy of it may have, too.
    """
    is_path = Path(root).is_absolute()
    if is_path and checkpoint is not None and Path(root).resolve() == checkpoint.resolve():
        return True
    if is_path and source.startswith((".", "/", "~")):
        return False
    model_id = source.removeprefix("hub:").partition("@")[0]
    return any(each == model_id or Path(each).name == Path(model_id).name for each in (name, root))


def _get(option: str, url: str, path: str, key: str) -> Any:
    """The JSON that a GET returns.

    Raises:
        ServiceError: there is no such answer.
    """
    from urllib.error import HTTPError  # here, not at the top: most plans ask no server
    from urllib.request import Request, urlopen

    try:
        request = Request(url + path, headers={"Authorization": f"Bearer {key}"} if key else {})
        with urlopen(request, timeout=HEALTH_CHECK_SECONDS) as response:
            return json.loads(response.read())
    except HTTPError as error:
        if error.code in (401, 403):
            hint = "set serve.api_key_env to the variable with its API key"
            raise ServiceError(f"{option}={url}: the server refuses the API key", hint) from None
        reason = f"{path} answers {error.code}"
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
    raise ServiceError(
        f"{option}={url}: no vLLM server answers ({reason}), and keys hold its version",
        f"start it; or remove {option}, and a server is started, with the same keys if its vLLM has the same version",
    )
