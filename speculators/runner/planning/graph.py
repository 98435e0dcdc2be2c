"""The pipeline graph: kinds of stages, the nodes of a recipe, and how nodes may be connected.

`KINDS` defines for each kind of stage its inputs and outputs, the options that it may read (and that so enter its key),
the server that it needs, and its version. The recipe's `pipeline` names nodes and their inputs; `build` checks it and
adds the nodes that fetch models and datasets. The graph alone determines the order of the stages.
"""

from __future__ import annotations

import graphlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter

from speculators.config.choices import DataFormat, Dtype
from speculators.config.schema import Config, Dataset
from speculators.errors import RecipeError, closest

SERVE = "serve"
"""The kind of node that is a server and has no artifact."""

FIDELITY_OPTIONS = ("target.min_greedy_agreement", "target.max_reference_gib")
"""Options of the fidelity check (`targets.fidelity_check`)."""

TEMPLATE_OPTION = "target.chat_template_kwargs"
"""Option of every stage that renders conversations, or has the server render them."""

PARSERS = ("serve.tool_call_parser", "serve.reasoning_parser")
"""Options of what a server makes of the text of an answer, which is part of later prompts."""

ENGINE_ARGUMENTS = "serve.extra_args"
"""Option of every stage with a server: arguments such as `--quantization` change what the target answers."""

TARGET = "target"
"""The node that fetches the target, and the input name under which stages get it."""

DRAFT = "draft"
"""The node that fetches `evaluate.draft`, a speculator that the recipe does not train."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """Declaration of a kind of stage."""

    version: int
    """Raised when a code change makes the stage's output differ for the same inputs and options."""
    gives: tuple[str, ...]
    """Types of its artifact; an input of one of these types may be wired to it."""
    takes: Mapping[str, str] = field(default_factory=dict)
    """Types of its inputs, by the input's name in the pipeline."""
    reads: tuple[str, ...] = ()
    """Options that the stage may read; the semantic ones enter the key."""
    derived: tuple[str, ...] = ()
    """Derived values that the stage may read; all enter the key."""
    target: bool = True
    """Whether it reads the target's checkpoint."""
    serve: str = ""
    """Mode of the server that it needs, wired as `target: serve`; empty: none."""
    datasets: str = ""
    """Option (`data`, `evaluate.datasets`) with the datasets that it reads."""
    adopts: bool = False
    """Whether its datasets are directories of upstream speculators, with rows and hidden states."""
    drawn: str = ""
    """The input that a live server can replace; the stage then requests the same data while it runs."""
    reuses: str = ""
    """What rows of its earlier artifacts are found by (`reuse`): `answers` or `tokens`; empty: none is."""
    trains: bool = False
    """Whether it computes on a device in its own process."""
    measures: bool = False
    """Whether it measures speed, so that no other stage may run on the same cores."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions affect the output, and so enter the key."""


KINDS: dict[str, Kind] = {
    "fetch": Kind(version=1, gives=("source",), derived=("source", "as"), target=False),
    "prompts": Kind(
        version=3, gives=("prompts", "conversations"), reads=("prompts", "data"), target=False, datasets="data"
    ),
    "regenerate": Kind(
        version=2,
        gives=("conversations", "states"),
        takes={"prompts": "prompts"},
        reads=("regenerate", "max_seq_len", "target.dtype", TEMPLATE_OPTION, *PARSERS, ENGINE_ARGUMENTS),
        serve="generate",
        reuses="answers",
    ),
    "tokenize": Kind(
        version=2,
        gives=("tokens",),
        takes={"conversations": "conversations"},
        reads=("tokenize", "max_seq_len", TEMPLATE_OPTION),
        packages=("transformers", "tokenizers"),
    ),
    "vocab": Kind(version=1, gives=("vocabulary",), takes={"tokens": "tokens"}, reads=("vocab",)),
    "extract": Kind(
        version=3,
        gives=("features",),
        takes={"tokens": "tokens"},
        reads=("extract", "target.dtype", *FIDELITY_OPTIONS, ENGINE_ARGUMENTS),
        derived=("layer_ids", "capture_layer_ids", "last_state"),
        serve="extract",
        reuses="tokens",
    ),
    "adopt_tokens": Kind(
        version=1,
        gives=("tokens",),
        reads=("data", "tokenize", "max_seq_len"),
        target=False,
        datasets="data",
        adopts=True,
    ),
    "adopt_states": Kind(
        version=2,
        gives=("features",),
        takes={"tokens": "tokens"},
        reads=("extract", "target.dtype"),
        derived=("layer_ids", "capture_layer_ids", "last_state"),
        datasets="data",
        adopts=True,
    ),
    "collect": Kind(
        version=4,
        gives=("features",),
        takes={"tokens": "tokens", "states": "states"},
        reads=("extract.dtype", "target.dtype"),
        derived=("layer_ids", "capture_layer_ids", "last_state"),
    ),
    "train": Kind(
        version=9,
        gives=("speculator",),
        takes={"tokens": "tokens", "features": "features", "vocab": "vocabulary"},
        reads=("train", "speculator", "target.dtype", *FIDELITY_OPTIONS),
        derived=("layer_ids", "capture_layer_ids"),
        drawn="features",
        trains=True,
    ),
    "evaluate": Kind(
        version=5,
        gives=("evaluation",),
        takes={"speculator": "speculator"},
        reads=("evaluate", "data", "prompts.eval_holdout_ratio", "target.dtype", TEMPLATE_OPTION, ENGINE_ARGUMENTS),
        derived=("num_speculative_tokens",),
        datasets="evaluate.datasets",
        measures=True,
    ),
}
"""Every kind of stage by the name of its module in `speculators.stages`."""

DRAWING = ("extract.dtype", "extract.connector", "extract.concurrency", "extract.retries", "extract.timeout",
           ENGINE_ARGUMENTS)  # fmt: skip
"""Further options of a stage that draws hidden states from a live server: those of `extract`, which it replaces, but
for the size of shards, since it writes none."""

KEEPING = ("extract.on_bad_row", "extract.connector", "extract.dtype", "extract.shard_tokens")
"""Further options of a stage that stores the hidden states of the answers that it generates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A stage of a recipe."""

    name: str
    kind: str
    inputs: Mapping[str, str]
    """Nodes by input name, those that fetch included."""
    source: str = ""
    """Source of a `fetch` node, as written in the recipe."""
    fetch_as: str = ""
    """What a `fetch` node fetches: `checkpoint`, `draft`, `file` or `directory`."""
    selection: Mapping[str, str] = field(default_factory=dict)
    """`subset` and `split` of the dataset that a `fetch` node fetches, as far as the recipe names them."""
    keeps_states: bool = False
    """Whether it stores the hidden states of the answers that it generates, for another node."""
    keeps_answers: bool = False
    """Whether its conversations keep the data's own answers, because another node tokenises them as they are."""
    reuses_all: bool = False
    """Whether earlier artifacts have all that its server would compute."""
    part: tuple[int, int] | None = None
    """For a worker that does a part of another node's work: its index, from 0, and the number of parts."""
    parts: tuple[str, ...] = ()
    """Nodes of the workers whose outputs this node joins; its key has the inputs that theirs have."""

    @property
    def spec(self) -> Kind:
        return KINDS[self.kind]

    @property
    def needs(self) -> tuple[str, ...]:
        """The nodes that it depends on."""
        return (*self.inputs.values(), *self.parts)

    @property
    def lazy(self) -> bool:
        """Whether it runs only if another node that runs needs it."""
        return self.kind == "fetch" or self.part is not None

    @property
    def draws(self) -> bool:
        """Whether it draws hidden states from a live server while it runs."""
        return bool(self.spec.drawn) and self.spec.drawn not in self.inputs

    @property
    def mode(self) -> str:
        """Mode of the server that it needs; empty: none."""
        if self.parts or self.reuses_all:
            return ""
        return "extract" if self.keeps_states or self.draws else self.spec.serve

    @property
    def reads(self) -> tuple[str, ...]:
        """Options that it may read."""
        return (*self.spec.reads, *(DRAWING if self.draws else ()), *(KEEPING if self.keeps_states else ()))

    @property
    def derived(self) -> tuple[str, ...]:
        """Derived values that it may read."""
        return ("capture_layer_ids", "last_state") if self.keeps_states else self.spec.derived


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """A server that a stage needs while it runs."""

    name: str
    """Name under which the stage gets it."""
    mode: str
    """`generate`, `extract`, `baseline` or `speculative`."""
    dtype: Dtype
    """Format in which the target computes."""
    num_speculative_tokens: int | None = None
    """Tokens that the draft proposes in one step, for `speculative`; None: as many as the draft does by default."""
    url: str = ""
    """URL of a running server; empty: one is started."""


def phases(node: Node, config: Config) -> list[list[Serving]]:
    """Servers that a node needs, by phase: those of a phase run at the same time, and phases follow each other.

    Only `evaluate` has several phases: speed and acceptance in the target's dtype, then losslessness in float32 (unless
    it is the target's dtype), because rounding could hide a defect; both with each number of speculative tokens. The
    baseline is in every phase, since it is measured in turns with the draft; its server stays up in between.
    """
    if node.mode:
        return [[Serving(name=TARGET, mode=node.mode, dtype=config.target.dtype, url=config.serve.url)]]
    if node.kind != "evaluate":
        return [[]]
    dtype, urls = config.target.dtype, external_urls(node, config)
    counts: list[int | None] = [*config.evaluate.num_speculative_tokens] or [None]
    pairs = [
        [
            Serving(name="baseline", mode="baseline", dtype=dtype, url=urls.get("serve.baseline_url", "")),
            Serving(
                name="speculative",
                mode="speculative",
                dtype=dtype,
                num_speculative_tokens=count,
                url=urls.get("serve.speculative_url", ""),
            ),
        ]
        for count in dict.fromkeys(counts)
    ]
    if dtype is Dtype.float32 or not config.evaluate.lossless_prompts:
        return pairs
    return [
        *pairs,
        *([replace(s, name=f"{s.name}_float32", dtype=Dtype.float32, url="") for s in pair] for pair in pairs),
    ]


def external_urls(node: Node, config: Config) -> dict[str, str]:
    """The running servers that a node uses, by the option that names each; {} if its servers are started."""
    serve = config.serve
    if node.kind == "evaluate":
        urls = {"serve.baseline_url": serve.baseline_url, "serve.speculative_url": serve.speculative_url}
    else:
        urls = {"serve.url": serve.url} if node.mode or node.parts else {}
        urls |= {f"serve.extra_urls[{i}]": url for i, url in enumerate(serve.extra_urls) if urls and serve.url}
    return {option: url.rstrip("/") for option, url in urls.items() if url}


def starts_servers(node: Node, config: Config) -> bool:
    """Whether a server has to be started for the node."""
    return any(not serving.url for phase in phases(node, config) for serving in phase)


def build(config: Config) -> dict[str, Node]:
    """Build the nodes of a recipe, in data-flow order.

    Raises:
        RecipeError: an unknown kind, a missing or unknown input, incompatible types, or a cycle.
    """
    kinds = {name: wiring.get("uses", name) for name, wiring in config.pipeline.items()}
    _check_kinds(kinds)
    nodes: dict[str, Node] = {}
    for name, wiring in config.pipeline.items():
        if kinds[name] == SERVE:
            continue
        inputs = _wire(name, kinds, {k: v for k, v in wiring.items() if k != "uses"})
        spec = KINDS[kinds[name]]
        if DRAFT in inputs.values():
            nodes[DRAFT] = Node(name=DRAFT, kind="fetch", inputs={}, source=config.evaluate.draft, fetch_as=DRAFT)
        if spec.target:
            inputs[TARGET] = TARGET
            nodes[TARGET] = Node(
                name=TARGET, kind="fetch", inputs={}, source=config.target.source, fetch_as="checkpoint"
            )
        for dataset, options in (attrgetter(spec.datasets)(config) if spec.datasets else {}).items():
            fetch = f"dataset.{dataset}"
            inputs[fetch] = fetch
            fetch_as = _dataset_as(name, kinds[name], dataset, options)
            chosen = {"subset": options.subset, "split": options.split}
            nodes[fetch] = Node(
                name=fetch,
                kind="fetch",
                inputs={},
                source=options.source,
                fetch_as=fetch_as,
                selection={name: value for name, value in chosen.items() if value is not None},
            )
        nodes[name] = Node(name=name, kind=kinds[name], inputs=inputs)
    stores_states = {node.inputs["states"] for node in nodes.values() if "states" in node.inputs}
    answered = {node.inputs.get("conversations") for node in nodes.values()}
    nodes = {
        name: replace(
            node, keeps_states=name in stores_states, keeps_answers="prompts" in node.spec.gives and name in answered
        )
        for name, node in nodes.items()
    }
    return _ordered(_with_workers(nodes, config.extract.workers))


def _with_workers(nodes: dict[str, Node], workers: int) -> dict[str, Node]:
    """Add a node for each worker of an extraction that has several: `extract.1`, `extract.2`, ..."""
    if workers == 1:
        return nodes
    all_nodes: dict[str, Node] = {}
    for name, node in nodes.items():
        parts = tuple(f"{name}.{i + 1}" for i in range(workers)) if node.kind == "extract" else ()
        all_nodes |= {part: replace(node, name=part, part=(i, workers)) for i, part in enumerate(parts)}
        all_nodes[name] = replace(node, parts=parts)
    return all_nodes


def select_nodes(nodes: dict[str, Node], config: Config) -> dict[str, Node]:
    """Restrict the graph to the stage of `until` or `only` and all that it depends on.

    Raises:
        RecipeError: `force`, `from`, `until` or `only` names no stage, or a stage that is left out; or there is none.
    """
    if not nodes:
        raise RecipeError("pipeline={}: the recipe has no stages", "pipeline=offline, or another choice")
    for option, names in (("force", config.force), ("from", [config.from_]), ("until", [config.until]),
                          ("only", [config.only])):  # fmt: skip
        for name in filter(None, names):
            if name not in nodes:
                raise RecipeError(f"{option}={name}: the recipe has no stage `{name}`", closest(name, nodes))
    if config.only and config.until:
        raise RecipeError(f"until={config.until}: only={config.only} runs a single stage", "remove one of them")
    last = config.only or config.until
    if not last:
        return nodes
    needed, pending = set(), [last]
    while pending:
        name = pending.pop()
        needed.add(name)
        pending += nodes[name].needs
    option = f"only={config.only}" if config.only else f"until={config.until}"
    for again, names in (("from", [config.from_]), ("force", config.force)):
        for name in filter(None, names):
            if name not in needed:
                raise RecipeError(
                    f"{again}={name}: {option} leaves `{name}` out, so that it would not run again",
                    f"until={name}, or remove {option}",
                )
    return {name: node for name, node in nodes.items() if name in needed}


def find_node(nodes: Mapping[str, Node], name: str) -> str:
    """Name of the node of this name, else of the only one of this kind.

    Raises:
        RecipeError: there is none, or there are several of the kind.
    """
    if name in nodes:
        return name
    of_kind = [node.name for node in nodes.values() if node.kind == name]
    if len(of_kind) == 1:
        return of_kind[0]
    if of_kind:
        raise RecipeError(f"several stages are of kind `{name}`", f"name one: {', '.join(of_kind)}")
    raise RecipeError(f"the recipe has no stage `{name}`", closest(name, nodes))


def missing_for_only(only: str, name: str) -> RecipeError:
    """The error for `only` if another stage that it needs has no artifact."""
    return RecipeError(
        f"only={only}: needs `{name}`, which has no artifact", f"until={only} instead, which also runs what it needs"
    )


def forced_nodes(nodes: Mapping[str, Node], config: Config) -> set[str]:
    """Names of the stages of `force`, and of `from` with all later ones; workers included."""
    follows = {config.from_} if config.from_ else set()
    for name, node in nodes.items():  # in data-flow order
        if follows & set(node.inputs.values()):
            follows.add(name)
    stages = {*config.force, *follows}
    return {*stages, *(part for name in stages if name in nodes for part in nodes[name].parts)}


def _check_kinds(kinds: Mapping[str, str]) -> None:
    known = {*KINDS, SERVE} - {"fetch"}
    for name, kind in kinds.items():
        if kind not in known:
            hint = closest(kind, known) + "; a second node of a kind has `uses: KIND`"
            raise RecipeError(f"pipeline.{name}: there is no stage `{kind}`", hint)
        if not re.fullmatch(r"\w[\w-]*", name):
            hint = "name the node by letters, digits, _ and -"
            raise RecipeError(f"pipeline: `{name}` cannot name a node, which names files", hint)
        if name in (TARGET, DRAFT) or name.startswith("dataset."):
            raise RecipeError(f"pipeline.{name}: this name is reserved", "choose another name for the node")


def _wire(name: str, kinds: Mapping[str, str], wiring: Mapping[str, str]) -> dict[str, str]:
    """Check the wiring of a node and return its inputs that are artifacts, which excludes the server."""
    spec = KINDS[kinds[name]]
    slots = {**spec.takes, **({TARGET: SERVE} if spec.serve else {})}
    if spec.drawn and TARGET in wiring:
        if spec.drawn in wiring:
            both = f"`{spec.drawn}` come from `{wiring[spec.drawn]}` or from a server, not from both"
            raise RecipeError(f"pipeline.{name}: {both}", f"remove `{spec.drawn}` or `{TARGET}`")
        slots = {**{slot: gives for slot, gives in slots.items() if slot != spec.drawn}, TARGET: SERVE}
    for slot in wiring:
        if slot not in slots:
            raise RecipeError(f"pipeline.{name}: `{kinds[name]}` has no input `{slot}`", closest(slot, slots))
    inputs = {}
    for slot, gives in slots.items():
        upstream = wiring.get(slot)
        if upstream is None:
            or_draw = f", or `{TARGET}: {SERVE}` to draw them from the server" if slot == spec.drawn else ""
            hint = f"add `{slot}: NODE` of type {gives}{or_draw}"
            raise RecipeError(f"pipeline.{name}: the input `{slot}` is not wired", hint)
        if upstream == DRAFT and gives == "speculator":
            inputs[slot] = DRAFT
            continue
        if upstream not in kinds:
            raise RecipeError(f"pipeline.{name}.{slot}: there is no node `{upstream}`", closest(upstream, kinds))
        outputs = _gives(kinds[upstream])
        if gives not in outputs:
            fits = [n for n, k in kinds.items() if gives in _gives(k)]
            raise RecipeError(
                f"pipeline.{name}.{slot}: `{upstream}` gives {' and '.join(outputs)}, this input takes {gives}",
                f"wire it to {' or '.join(f'`{n}`' for n in fits) or 'a node that gives ' + gives}",
            )
        if gives != SERVE:
            inputs[slot] = upstream
    return inputs


def _dataset_as(name: str, kind: str, dataset: str, options: Dataset) -> str:
    """What `fetch` fetches for a dataset: `file` or `directory`, depending on the kind of stage that reads it.

    Raises:
        RecipeError: the dataset has the other form.
    """
    adopts = options.format is DataFormat.upstream
    if adopts != KINDS[kind].adopts:
        expected = "format upstream" if KINDS[kind].adopts else "a file of conversations"
        format_name = options.format.name if options.format else "null"
        raise RecipeError(
            f"pipeline.{name}: `{kind}` reads datasets of {expected}, {dataset} has format {format_name}",
            "pipeline=upstream is for directories of rows and hidden states, every other pipeline for conversations",
        )
    return "directory" if adopts else "file"


def _gives(kind: str) -> tuple[str, ...]:
    return (SERVE,) if kind == SERVE else KINDS[kind].gives


def _ordered(nodes: dict[str, Node]) -> dict[str, Node]:
    """Sort nodes in data-flow order; otherwise they keep the order of the recipe."""
    sorter = graphlib.TopologicalSorter({name: node.needs for name, node in nodes.items()})
    try:
        order = list(sorter.static_order())
    except graphlib.CycleError as error:
        cycle = " -> ".join(error.args[1])
        raise RecipeError(f"pipeline: nodes depend on each other: {cycle}", "remove one of these inputs") from None
    return {name: nodes[name] for name in order}
