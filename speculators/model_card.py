"""The model card of a draft's checkpoint, README.md: `train` writes one, `publish` one with the measurements."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "README.md"
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_LICENSE = re.compile(r"^(license(?:_name|_link)?): *(\S.*)$", re.MULTILINE)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name of a model is a hub id (`ORG/NAME`) and not a path such as `../NAME`."""
    return bool(_HUB_ID.fullmatch(name))


def stated_license(checkpoint: Path) -> dict[str, str]:
    """The fields `license`, `license_name` and `license_link` of a checkpoint's own model card; {} if it has none."""
    try:
        front_matter = _FRONT_MATTER.match((checkpoint / FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
    fields = _LICENSE.findall(front_matter[1]) if front_matter else []
    return {name: value.strip("'\"") for name, value in fields}


def model_card(
    config: Mapping[str, Any], *, model: str, revision: str = "", license: Mapping[str, str],
    training: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None, origin: str = "",
) -> str:  # fmt: skip
    """Write the card of a checkpoint.

    Args:
        config: the checkpoint's config.json.
        model: how the checkpoint is named in the command that serves it: a hub id or a directory.
        revision: commit of the target that it was trained for; empty: unknown.
        license: fields of the target's model card, see `stated_license`.
        training: `summary.json` of the training.
        evaluation: `evaluation.json`, if it was measured.
        origin: text about the command that made it.
    """
    spec = config["speculators_config"]
    algorithm, target, tokens = spec["algorithm"], spec["verifier"]["name_or_path"], _num_tokens(config)
    front_matter: dict[str, Any] = {
        **({"base_model": target} if is_hub_id(target) else {}),
        **license,
        "pipeline_tag": "text-generation",
        "tags": ["speculators", "speculative-decoding", algorithm, "vllm"],
    }
    quoted = shlex.quote(model)
    commit = f" (revision `{revision}`)" if revision else ""
    parts = [
        # JSON values are YAML.
        "---\n" + "".join(f"{name}: {json.dumps(value)}\n" for name, value in front_matter.items()) + "---",
        f"# Draft model ({algorithm}) for {target}",
        f"For speculative decoding in vLLM: it proposes {tokens} tokens per step, which the target `{target}`{commit} "
        "verifies. Outputs are those of the target.",
        "## Serve",
        f"```bash\nvllm serve {quoted}\n```",
        "vLLM reads the target, the method and the number of proposed tokens from `config.json`. Its wheel for CPUs "
        f"has no such command:\n\n```bash\npython -m vllm.entrypoints.openai.api_server --model {quoted}\n```",
    ]
    if evaluation:
        parts += ["## Evaluation", _evaluation(evaluation)]
    parts += ["## Training", _training(config, training)]
    if origin:
        parts += [origin]
    return "\n\n".join(parts) + "\n"


def _num_tokens(config: Mapping[str, Any]) -> int:
    return int(config["speculators_config"]["proposal_methods"][0]["speculative_tokens"])


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    """The measurements as a table, and under which conditions they hold."""
    measured = [(name, row) for name, dataset in evaluation["datasets"].items() for row in dataset["measurements"]]
    longest = max(row["num_speculative_tokens"] for _, row in measured)
    head = ["dataset", "proposed tokens", "requests in flight", "acceptance length"]
    head += [*(f"position {i + 1}" for i in range(longest)), "baseline tokens/s", "speculative tokens/s", "speed-up"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, row in measured:
        setting = [str(row["num_speculative_tokens"]), str(row["concurrency"])]
        shares = [f"{share:.3f}" for share in row["per_position"]]
        shares += [""] * (longest - len(shares))
        speeds = [f"{row[side]['tokens_per_second']:.1f}" for side in ("baseline", "speculative")]
        rows.append([name, *setting, f"{row['acceptance_length']:.3f}", *shares, *speeds, f"{row['speed_up']:.2f}x"])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    notes = [
        f"Measured in vLLM in {evaluation['dtype']} at temperature {evaluation['temperature']:g}, answers of at most "
        f"{evaluation['max_tokens']} tokens. Acceptance length: tokens per step with the bonus token. Position i: "
        "share of steps that accept at least i tokens."
    ]
    if lossless := evaluation.get("lossless"):
        notes.append(
            f"Greedy in float32, {lossless['identical']} of {lossless['prompts']} outputs are identical to those "
            f"without the draft; {lossless['ties']} differ at numeric ties, {lossless['faults']} differ otherwise."
        )
    return "\n\n".join([table, *notes])


def _training(config: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    validation = training.get("validation") or {}
    sentences = [
        f"{training['steps']:,} steps over {training['tokens']:,} tokens; {training['parameters']:,} trained "
        f"parameters; draft vocabulary of {config['draft_vocab_size']:,} tokens."
    ]
    if length := validation.get("acceptance_length"):
        sentences.append(
            f"Acceptance length on the validation split ({training['validation_rows']} conversations that were not "
            f"trained on), from the target's hidden states: {length:.3f}."
        )
    return " ".join(sentences)
