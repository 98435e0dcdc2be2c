"""The plan: for every node, whether its artifact exists, and if not, the reason.

`Planner.step` plans one node from the digests of its inputs. `Planner.plan` calls it for every node with the digests in
the store, `execute` with those of artifacts as they are published, so that plan and run agree. Nothing here starts a
process or writes a file.
"""

from __future__ import annotations

import datetime
import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speculators.config.fields import identity
from speculators.config.schema import Config
from speculators.data.files import SELECTED
from speculators.errors import SourceError
from speculators.packages import installed_version, public_version
from speculators.runner import hardware
from speculators.runner.execution import schedule
from speculators.runner.execution.placement import Placement, placement_for
from speculators.runner.planning import checks, derive, draft, graph, key, sources
from speculators.runner.planning.graph import DRAFT, TARGET, Node, Serving
from speculators.runner.planning.reuse import NO_REUSE, Reuse, find_answers, find_extracted
from speculators.runner.planning.sizes import Sizes, sizes_of
from speculators.runner.servers import external, vllm
from speculators.runner.store.artifact import Artifact
from speculators.runner.store.artifacts import Store
from speculators.tokenizer_files import chat_template, date_variable, mask_token

FIXED_DATE = datetime.date(2026, 1, 1)
"""What chat templates get in place of today's date, if the recipe names none."""

DESCRIBED = 2
"""Changed options in a reason; `explain` has all."""


class State(enum.Enum):
    """State of a node in the plan."""

    cached = "cached"
    """Its artifact exists."""
    run = "run"
    """Its inputs are known and its artifact does not exist."""
    waits = "waits"
    """An input does not exist yet, so its key is unknown."""
    unneeded = "unneeded"
    """A source that has not been fetched and that no stage needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The plan for one node."""

    node: Node
    state: State
    reason: str
    """`made by RUN`, `local`, `new`, `changed: ...`, `version A -> B`, `upstream: NODE`, `forced`, `incomplete`; of a
    source on the hub also `sources.NOT_RESOLVED`; before the reason, `16 of 400 rows new; ` for a stage that reuses the
    others."""
    key: str = ""
    """Empty while the node waits."""
    preimage: dict[str, Any] = field(default_factory=dict)
    derived: dict[str, Any] = field(default_factory=dict)
    artifact: Artifact | None = None
    digest: str = ""
    """Digest of the output, empty while unknown; a source's is known before it is fetched."""
    path: Path | None = None
    """Path of the output; None until it exists."""
    reuse: Reuse = NO_REUSE
    """Earlier answers that a stage which has to run may use."""


class Planner:
    """Plans a recipe with a store; the constructor checks the recipe.

    Raises:
        RecipeError, SourceError, ServiceError, ContractError: see `graph.build`, `sources.resolve`, `derive`.
    """

    def __init__(self, config: Config, store: Store, hub: sources.Hub | None = None) -> None:
        self.config = config
        self.store = store
        self.hub = hub or sources.Hub(locked=sources.locked_revisions(config.recipe))
        self.graph = graph.select_nodes(graph.build(config), config)
        schedule.check_limits(config)
        checks.check_graph(config, self.graph)
        if any(node.mode == "extract" for node in self.graph.values()):
            vllm.check_extraction(config)
        self.forced = graph.forced_nodes(self.graph, config)
        """Stages that run although their artifact exists; execution removes a stage once it has run."""
        self._sources = {n.name: self._resolve(n) for n in self.graph.values() if n.kind == "fetch"}
        self.notes = [source.note for source in self._sources.values() if source.note]
        """What the recipe leaves open and how it was understood, for the terminal."""
        self.engine = self._engine()
        self.packages = {p: installed_version(p) or "" for n in self.graph.values() for p in n.spec.packages}
        self._external: dict[tuple[str, ...], dict[str, str]] = {}
        self.derived: dict[str, Any] = {}
        self.facts: derive.Facts | None = None
        self._placements: dict[tuple[str, str], Placement] = {}
        self._draft: draft.DraftFacts | None = None
        self.learn_checkpoints()

    def learn_checkpoints(self) -> None:
        """Compute derived values from the config.json of target and draft; called again after they are fetched."""
        if TARGET not in self.graph:
            return
        self._placements.clear()
        checkpoint = self.step(TARGET, {}).path
        self.facts = derive.facts(self.config, checkpoint)
        if self.facts is not None:
            self._fit_defaults(self.facts)
            local = self._sources[TARGET].path is not None
            checks.check_target(self.config, self.graph, checkpoint, self.facts, local=local)
            self._fix_date(checkpoint)
            self.derived = derive.derive(self.config, self.facts)
            if checkpoint is not None:
                self._choose_mask_token(checkpoint, self.facts.vocab_size)
        if DRAFT in self.graph and (directory := self.step(DRAFT, {}).path) is not None:
            self._draft = draft.of_checkpoint(directory)
            if self.facts is not None:
                draft.check_fits(self.config, self._draft, self.facts)

    def draft_of(self, node: Node) -> draft.DraftFacts | None:
        """The facts of the draft that a node measures; None while a given draft is not fetched."""
        return self._draft if node.inputs["speculator"] == DRAFT else draft.of_recipe(self.config.speculator)

    def proposal(self, node: Node, serving: Serving) -> dict[str, Any]:
        """vLLM's speculative config for a server that a node needs, but for the draft's path; {} without a draft."""
        if serving.mode != "speculative":
            return {}
        facts = self.draft_of(node)
        if facts is None:
            return {"method": "METHOD", "num_speculative_tokens": serving.num_speculative_tokens or "NUMBER"}
        tokens = serving.num_speculative_tokens or draft.tokens_to_measure(self.config, facts)[0]
        return {**facts.method, "num_speculative_tokens": tokens}

    def _fit_defaults(self, known: derive.Facts) -> None:
        """Lower `max_seq_len` and `vocab.size` to what the target has, where the recipe leaves their defaults."""
        size = self.config.vocab.size
        if size == Config().vocab.size and size is not None and size > known.vocab_size:
            self.config = replace(self.config, vocab=replace(self.config.vocab, size=None))
            self.notes.append(f"vocab.size=null: the target has {known.vocab_size} tokens")
        longest = derive.default_length(self.config, known)
        if longest != self.config.max_seq_len:
            self.config = replace(self.config, max_seq_len=longest)
            self.notes.append(f"max_seq_len={longest}: the target has {known.positions} positions")

    def _fix_date(self, checkpoint: Path | None) -> None:
        """Give the chat template a date in place of today's, so that a key has the same prompts on every day."""
        chatting = any(node.kind in checks.CHATTING for node in self.graph.values())
        template = chat_template(checkpoint) if chatting and checkpoint is not None else None
        if template is None or "strftime_now" not in template:
            return
        target = self.config.target
        variable = date_variable(template)
        if variable is None:
            note = (
                "the chat template writes today's date, so that prompts differ from day to day under one key; to fix "
            )
            note += "it, write a date in place of strftime_now(...) into chat_template.jinja of a copy of the target"
        elif (name := variable[0]) in target.chat_template_kwargs:
            return
        else:
            date = FIXED_DATE.strftime(variable[1])
            kwargs = {**target.chat_template_kwargs, name: date}
            self.config = replace(self.config, target=replace(target, chat_template_kwargs=kwargs))
            note = f'target.chat_template_kwargs.{name}="{date}": the chat template would write today\'s date'
        if note not in self.notes:
            self.notes.append(note)

    def _choose_mask_token(self, checkpoint: Path, vocab_size: int) -> None:
        """Show the mask token that training will choose; it is in no key, because the target's files determine it."""
        if not any(node.spec.trains for node in self.graph.values()) or not self.config.speculator.needs_mask_token():
            return
        token = mask_token(checkpoint, vocab_size)
        if token is None:  # known when training starts
            return
        self.derived["mask_token_id"] = token.id
        note = f"speculator.mask_token_id: {token.id} is `{token.text}`, which answers contain; the target has no other"
        if token.in_answers and note not in self.notes:
            self.notes.append(note)

    def refuse_unresolved(self) -> None:
        """Check that every source is resolved, without which no stage can run.

        Raises:
            SourceError: one of the hub is not.
        """
        if self.unresolved:
            raise self.unresolved[0]

    @property
    def unresolved(self) -> list[SourceError]:
        """Why the commits of sources on the hub are unknown."""
        return [source.unresolved for source in self._sources.values() if source.unresolved is not None]

    @functools.cached_property
    def machine(self) -> hardware.Machine:
        """The machine that the recipe is planned for. GPUs are not looked for where vLLM runs on the CPU."""
        if vllm.device(self.config) == "cpu":
            return hardware.find_machine(look_for_gpus=False)
        return hardware.machine_of(self.config.hardware)

    def placement(self, node: Node) -> Placement:
        """Where the servers and the process of a stage run; as `placement_for` raises for what does not fit."""
        name_and_mode = node.name, node.mode
        if name_and_mode not in self._placements:
            self._placements[name_and_mode] = placement_for(node, self.config, self.machine, self._sizes())
        return self._placements[name_and_mode]

    def _sizes(self) -> Sizes:
        if TARGET not in self.graph:
            return Sizes()
        longest = derive.max_model_len(self.config, self.facts, "speculative")
        return sizes_of(self.config, self.facts, self.step(TARGET, {}).path, longest)

    def plan(self) -> list[Step]:
        """Plan every node, in data-flow order, from the content of the store; leaves out workers of cached nodes.

        Raises:
            RecipeError: `only` names a stage that needs another one without an artifact.
        """
        steps: dict[str, Step] = {}
        for name in self.graph:
            known = {n: s.digest for n, s in steps.items() if s.digest}
            steps[name] = self.step(name, known)
        joined = {part for s in steps.values() if s.state is State.cached for part in s.node.parts}
        kept = [step for name, step in steps.items() if name not in joined]
        needed = {name for s in kept if s.state in (State.run, State.waits) for name in s.node.needs}
        only = self.config.only
        for step in kept:
            if only not in ("", step.node.name) and step.state in (State.run, State.waits) and not step.node.lazy:
                raise graph.missing_for_only(only, step.node.name)
        needed |= {only, self.config.until}
        return [self._unneeded(s) if s.node.lazy and s.node.name not in needed else s for s in kept]

    def step(self, name: str, digests: Mapping[str, str]) -> Step:
        """Plan one node; `digests` are the known digests of outputs, by node."""
        node = self.graph[name]
        missing = [i for i in node.inputs.values() if i not in digests]
        missing += self._unread(node)
        if missing:
            return Step(node=node, state=State.waits, reason=f"upstream: {missing[0]}{self._in_store(node, digests)}")
        source = self._sources.get(name)
        if source is not None and source.unresolved is not None:
            return Step(node=node, state=State.waits, reason=sources.NOT_RESOLVED)
        derived = self._derived(node)
        image = self._preimage(node, derived, digests)
        own_key = key.digest(image)
        fixed = source.digest if source else ""
        if source and source.path:
            return Step(
                node=node,
                state=State.cached,
                reason="local",
                key=own_key,
                preimage=image,
                derived=derived,
                digest=fixed,
                path=source.path,
            )
        artifact = None if name in self.forced else self.store.find(node.kind, own_key)
        if artifact is None:
            reason = "forced" if name in self.forced else self._why(node, image)
            step = Step(
                node=node, state=State.run, reason=reason, key=own_key, preimage=image, derived=derived, digest=fixed
            )
            return self._with_reuse(step) if node.spec.reuses and name not in self.forced else step
        maker = artifact.provenance.get("run", "another run")
        return Step(
            node=node,
            state=State.cached,
            reason=f"made by {maker}",
            key=own_key,
            preimage=image,
            derived=derived,
            artifact=artifact,
            digest=artifact.digest,
            path=_content(node, artifact),
        )

    def outside_key(self, node: Node) -> dict[str, Any]:
        """Further values that a stage may read, and that no key contains."""
        values: dict[str, Any] = {"served_dtypes": self.placement(node).dtypes}
        if "speculator" in node.spec.gives:
            values["verifier"] = self.verifier()
        return values

    def verifier(self) -> dict[str, str]:
        """Name and revision by which vLLM and upstream load the target: a hub id, or an absolute path without revision.

        The target has to be fetched.
        """
        identity = self._sources[TARGET].identity
        if identity["kind"] == "hub" and not identity["file"]:
            return {"name": identity["id"], "revision": identity["revision"]}
        path = self.step(TARGET, {}).path
        assert path is not None
        return {"name": str(path.absolute()), "revision": ""}

    def known(self, name: str, digests: Mapping[str, str]) -> dict[str, Any]:
        """A node's preimage without the inputs that do not exist yet."""
        node = self.graph[name]
        return self._preimage(node, {} if self._unread(node) else self._derived(node), digests)

    def identities(self, steps: Mapping[str, Step]) -> dict[str, str]:
        """Nodes of the steps that have to run, by a digest that is equal in two plans if the artifact will be the same.

        It is the key, where that is known; else it has the identities of the inputs that do not exist yet.
        """
        digests = {name: step.digest for name, step in steps.items() if step.digest}
        node_digests: dict[str, str] = {}
        for name, step in steps.items():
            pending = {slot: node_digests[node] for slot, node in step.node.inputs.items() if node in node_digests}
            node_digests[name] = step.digest or step.key or key.digest([self.known(name, digests), pending])
        return {node_digests[name]: name for name, step in steps.items() if step.state in (State.run, State.waits)}

    def _resolve(self, node: Node) -> sources.Source:
        name = node.name.removeprefix("dataset.")
        section = f"data.{name}" if name in self.config.data else f"evaluate.datasets.{name}"
        options = {TARGET: "target.source", DRAFT: draft.OPTION}
        option = options.get(node.name, f"{section}.source")
        return sources.resolve(option, node.source, node.fetch_as, self.hub, node.selection)

    def _engine(self) -> str:
        """Version of vLLM in the keys of stages for which servers are started; empty if none is."""
        if not any(graph.starts_servers(n, self.config) for n in self.graph.values()):
            return ""
        return public_version(vllm.require_engine(self.config.serve.python))

    def _service(self, node: Node) -> dict[str, str]:
        """What the keys of a stage hold of its servers; {} without servers."""
        if not node.parts and graph.phases(node, self.config) == [[]]:
            return {}
        urls = graph.external_urls(node, self.config)
        if not urls:
            return {"engine": self.engine}
        options = tuple(urls)
        if options not in self._external:
            self._external[options] = external.fingerprint(self.config, urls, self.step(TARGET, {}).path)
        # A server does not report which draft it has.
        return self._external[options] | ({"draft": "external"} if node.kind == "evaluate" else {})

    def _unread(self, node: Node) -> list[str]:
        """The source whose config.json is needed for a node's derived values and is not fetched; at most one."""
        if node.kind == "fetch" or not node.derived:
            return []
        if "num_speculative_tokens" in node.derived:
            return [] if self.draft_of(node) is not None else [DRAFT]
        return [] if self.derived else [TARGET]

    def _derived(self, node: Node) -> dict[str, Any]:
        if node.kind == "fetch":
            return {"source": self._sources[node.name].identity, "as": node.fetch_as}
        if "num_speculative_tokens" in node.derived and (facts := self.draft_of(node)) is not None:
            return {"num_speculative_tokens": draft.tokens_to_measure(self.config, facts)}
        part = {"part": list(node.part)} if node.part else {}
        answers = {"keeps_answers": True} if node.keeps_answers else {}
        return {name: self.derived[name] for name in node.derived} | part | answers

    def _preimage(self, node: Node, derived: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
        return key.preimage(
            node.kind,
            node.spec.version,
            config=identity(self.config, node.reads) | dict(derived),
            inputs={slot: digests[upstream] for slot, upstream in node.inputs.items() if upstream in digests},
            packages={name: self.packages[name] for name in node.spec.packages},
            service=self._service(node),
        )

    def _with_reuse(self, step: Step) -> Step:
        """The step of a stage whose rows the store may have, with what it has of them."""
        if step.node.spec.reuses == "tokens":
            reuse = NO_REUSE if step.node.parts else find_extracted(self.store, step.node.kind, step.preimage)
            return replace(step, reason=f"{reuse}; {step.reason}" if str(reuse) else step.reason, reuse=reuse)
        inputs = step.preimage["inputs"]
        prompts = next((a.data for a in self.store.artifacts("prompts") if a.digest == inputs.get("prompts")), None)
        reuse = find_answers(self.store, step.node.kind, step.preimage, step.key, prompts)
        reason = f"{reuse}; {step.reason}" if str(reuse) else step.reason
        return replace(step, node=replace(step.node, reuses_all=reuse.complete), reason=reason, reuse=reuse)

    def _in_store(self, node: Node, digests: Mapping[str, str]) -> str:
        """For a stage that answers conversations and waits for them: how many answers of its target the store has."""
        if node.spec.reuses != "answers" or node.name in self.forced:
            return ""
        answers = str(find_answers(self.store, node.kind, self.known(node.name, digests), "", None))
        return f"; {answers}" if answers else ""

    def _why(self, node: Node, image: dict[str, Any]) -> str:
        nearest = self.store.nearest(node.kind, image)
        if nearest is None or node.kind == "fetch" or not key.is_related(nearest.preimage, image):
            return "new"
        changes = key.preimage_differences(nearest.preimage, image)
        relevant = [change for change in changes if change[0] != "part"]  # the recipe does not set `part`
        return describe(relevant, node.name) if relevant else "new" if changes else "incomplete"

    @staticmethod
    def _unneeded(step: Step) -> Step:
        if step.state is State.cached:
            return step
        return Step(node=step.node, state=State.unneeded, reason="no stage reads it", key=step.key, digest=step.digest)


def steps_as_json(steps: Mapping[str, Step]) -> dict[str, Any]:
    """The steps of a run as JSON values, for `run.json` and `--json`."""
    return {
        name: {"stage": s.node.kind, "state": s.state.name, "reason": s.reason, "key": s.key, "digest": s.digest,
               "inputs": dict(s.node.inputs), "path": str(s.path) if s.path else None}
        for name, s in steps.items()
    }  # fmt: skip


def describe(changes: list[tuple[str, Any, Any]], name: str) -> str:
    """Describe a node's cache miss by the differences from the nearest earlier artifact: inputs, options, versions."""
    inputs = [name.removeprefix("input ") for name, _, _ in changes if name.startswith("input ")]
    options = [
        f"{name} {_short(old)} -> {_short(new)}"
        for name, old, new in changes
        if not name.startswith(("input ", "version"))
    ]
    if len(options) > DESCRIBED:
        options[DESCRIBED:] = [f"and {len(options) - DESCRIBED} more: explain {name}"]
    versions = [f"version {old} -> {new}" for name, old, new in changes if name == "version"]
    parts = [f"upstream: {', '.join(inputs)}"] if inputs else []
    parts += [f"changed: {', '.join(options)}"] if options else []
    return "; ".join(parts + versions)


def _short(value: Any) -> str:
    text = key.canonical(value).strip('"')
    return text if len(text) <= 32 else f"{text[:29]}..."


def draft_directory(step: Step) -> Path | None:
    """The directory of the draft's checkpoint, from the step that trains or fetches it; None until it exists."""
    if step.path is None or step.node.kind == "fetch":
        return step.path
    return step.path / "best"


def _content(node: Node, artifact: Artifact) -> Path:
    """Path of an artifact's content for the stages that read it: a fetched dataset's only file, else the directory."""
    if node.fetch_as != "file" or (artifact.data / SELECTED).is_file():
        return artifact.data
    return next(p for p in sorted(artifact.data.iterdir()) if p.is_file())
