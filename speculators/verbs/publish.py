"""publish: write a draft's checkpoint with its card, figures, recipe and lock into a directory or to the hub."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators import model_card, ui
from speculators.config.execution import RunOptions
from speculators.config.schema import Config, from_builtins
from speculators.errors import RecipeError, RunError, StoreError
from speculators.packages import installed_version
from speculators.runner import products
from speculators.runner.history import Run
from speculators.runner.planning.graph import TARGET
from speculators.runner.products import Product
from speculators.verbs import usage

HUB = "hub:"
RECIPE, RECIPE_LOCK = "recipe.yaml", "recipe.lock.json"


def publish_draft(argv: list[str]) -> int:
    """Write a run's draft, with its card, evaluation, recipe and lock, into a directory or to the hub."""
    arguments = usage.parse("publish", argv)
    if len(arguments.names) != 2:
        raise RecipeError("`publish` needs a run and a destination", "speculators-run publish last DIRECTORY")
    (name, _, node), destination = arguments.names[0].partition(":"), arguments.names[1]
    runs = Path(arguments.options.get("run.dir", RunOptions().dir)).expanduser()
    product, verifier = products.in_run(name, runs, node), _absolute(arguments.options.get("verifier", ""))
    files = published_files(product, destination.removeprefix(HUB), verifier)
    if destination.startswith(HUB):
        _check_hub(destination, verifier or product.verifier)
    elif os.path.lexists(Path(destination).expanduser()):
        raise RecipeError(f"`{destination}` exists", "name a directory that does not exist yet")
    if "--dry-run" in arguments.flags:
        print(ui.columns([(name, ui.size(_size(file))) for name, file in files.items()], right=[1]))
        ui.narrate(
            "dry run", destination, f"{len(files)} files, {ui.size(sum(map(_size, files.values())))}; nothing written"
        )
        return 0
    if destination.startswith(HUB):
        location = upload(destination.removeprefix(HUB), files)
    else:
        location = str(write_directory(Path(destination).expanduser(), files))
    ui.narrate("wrote", destination, location)
    if not destination.startswith(HUB):
        print(ui.labelled([("serve", shlex.join(["speculators-run", "serve", destination]))], ui.width()))
    return 0


def published_files(product: Product, model: str, verifier: str = "") -> dict[str, Path | bytes]:
    """The files to publish, by name: paths of existing ones, and the content of new ones.

    `model` is how the card names the checkpoint in commands; `verifier` replaces the target's name in config.json.
    """
    run = product.run
    assert run is not None
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(product.checkpoint.iterdir())}
    evaluation = _json(product.evaluation / products.EVALUATION) if product.evaluation else None
    config = _published_config(product.config, verifier, evaluation)
    lock = _json(run.path / products.LOCK)
    card = model_card.model_card(
        config,
        model=model,
        revision=lock.get("stages", {}).get(TARGET, {}).get("in_key", {}).get(f"{TARGET}.source.revision") or "",
        license=model_card.stated_license(product.target) if product.target else {},
        training=_json(product.training / "summary.json"),
        evaluation=evaluation,
        origin=_origin(run),
    )
    files[products.CONFIG] = _bytes(config)
    files[model_card.FILE] = card.encode()
    if product.evaluation:
        files[products.EVALUATION] = product.evaluation / products.EVALUATION
    files[RECIPE] = _recipe(run).encode()
    if lock:
        files[RECIPE_LOCK] = run.path / products.LOCK
    return files


def write_directory(directory: Path, files: Mapping[str, Path | bytes]) -> Path:
    """Write the files into a new directory, completely or not at all; returns its absolute path.

    Raises:
        StoreError: it cannot be written.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for name, file in files.items():
            if isinstance(file, Path):
                shutil.copyfile(file, temporary / name)
            else:
                (temporary / name).write_bytes(file)
        temporary.rename(directory)
    except OSError as error:
        raise StoreError(f"cannot write `{directory}`: {error.strerror}", "name a writable directory") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory.absolute()


def upload(repository: str, files: Mapping[str, Path | bytes]) -> str:
    """Upload the files as one commit of a model repository, which is created if it does not exist; returns its URL.

    Raises:
        RunError: the hub refuses, or cannot be reached.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message="Draft model with its card and its recipe")
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(
            f"the hub does not take {repository}: {reason}",
            "log in with `hf auth login` and a token that may write; or publish into a directory",
        ) from None
    return str(commit.commit_url)


def _check_hub(destination: str, verifier: str) -> None:
    """Check the names of the repository and of the target, which others cannot load from this machine's disk."""
    if not model_card.is_hub_id(destination.removeprefix(HUB)):
        raise RecipeError(f"`{destination}` is not hub:ORG/NAME", "for example hub:me/my-draft")
    if not model_card.is_hub_id(verifier):
        raise RecipeError(
            f"the draft's target is `{verifier}`, which is on this machine only",
            "name the same model on the hub: verifier=ORG/NAME",
        )


def _absolute(verifier: str) -> str:
    """A target's name; of a directory its absolute path, since vLLM may start in another directory."""
    path = Path(verifier).expanduser()
    return str(path.absolute()) if verifier and not model_card.is_hub_id(verifier) and path.is_dir() else verifier


def _published_config(config: dict[str, Any], verifier: str, evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """The checkpoint's config.json, with the target's name, if given, and the evaluated number of tokens."""
    spec = config["speculators_config"]
    if verifier:
        spec["verifier"]["name_or_path"] = verifier
    if evaluation:
        spec["proposal_methods"][0]["speculative_tokens"] = evaluation["num_speculative_tokens"]
    return config


def _origin(run: Run) -> str:
    """Section of the card: how to make the draft again."""
    version = installed_version("speculators-run")
    return (
        f"## Made by\n\n```bash\n{products.again(run)}\n```\n\nwith speculators-run {version}. `{RECIPE}` has all "
        f"options of that command and `{RECIPE_LOCK}` the revisions, versions and keys that they resolved to: in this "
        f"directory, `speculators-run plan recipe={RECIPE} run.locked=true` shows every difference."
    )


def _recipe(run: Run) -> str:
    from speculators.config.compose import as_recipe  # imports Hydra, which takes a third of a second

    return as_recipe(from_builtins(Config, run.config))


def _size(file: Path | bytes) -> int:
    return file.stat().st_size if isinstance(file, Path) else len(file)


def _bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is no such file, which earlier releases did not write."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return content
