"""The pipeline as data: kinds of stages, the nodes of a recipe, and what may be wired to what.

`KINDS` says for each kind of stage what it takes and gives, which options it may read (and so which enter its
key), what it needs served, and its version. The recipe's `pipeline` map names nodes and their inputs; `build`
checks it and adds the nodes that fetch models and data sets. Order is the graph's, nobody else's.
"""

from __future__ import annotations

import graphlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter

from speculators.config.choices import DataFormat, Dtype
from speculators.config.schema import Config, Dataset
from speculators.errors import RecipeError, closest

SERVE = "serve"
"""The kind of node that is a service, not an artifact."""

GATE = ("target.min_greedy_agreement", "target.max_reference_gib")
"""Options of `targets.fidelity_check`."""

TARGET = "target"
"""The node that fetches the target, and the input name under which stages get it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What Python knows of one kind of stage."""

    version: int
    """Raised by the author when the stage's output would differ for the same request."""
    gives: tuple[str, ...]
    """What its artifact is; an input of one of these types may be wired to it."""
    takes: Mapping[str, str] = field(default_factory=dict)
    """Input name in the pipeline -> type of artifact."""
    reads: tuple[str, ...] = ()
    """Options that the stage sees; their semantic fields enter the key."""
    derived: tuple[str, ...] = ()
    """Derived values that the stage sees; all enter the key."""
    target: bool = True
    """Reads the target's checkpoint."""
    serve: str = ""
    """Mode in which it needs the pipeline's server, wired as `target: serve`."""
    datasets: str = ""
    """Option (`data`, `evaluate.datasets`) that names the data sets whose files it reads."""
    adopts: bool = False
    """Its data sets are directories of upstream's, with rows and hidden states, and nothing else is."""
    drawn: str = ""
    """The input that it can do without: wired to the server instead, it draws the same from there while it runs."""
    trains: bool = False
    """Needs a device without being served."""
    measures: bool = False
    """Measures speed: where all share the cores, nothing may run beside it."""
    packages: tuple[str, ...] = ()
    """Distributions whose version changes the output."""


KINDS: dict[str, Kind] = {
    "fetch": Kind(version=1, gives=("source",), derived=("source", "as"), target=False),
    "prompts": Kind(version=1, gives=("prompts",), reads=("prompts", "data"), target=False, datasets="data"),
    "regenerate": Kind(
        version=1,
        gives=("conversations", "states"),
        takes={"prompts": "prompts"},
        reads=("regenerate", "max_seq_len", "target.dtype"),
        serve="generate",
    ),
    "tokenize": Kind(
        version=1,
        gives=("tokens",),
        takes={"conversations": "conversations"},
        reads=("tokenize", "max_seq_len"),
        packages=("transformers", "tokenizers"),
    ),
    "vocab": Kind(version=1, gives=("vocabulary",), takes={"tokens": "tokens"}, reads=("vocab",)),
    "extract": Kind(
        version=3,
        gives=("features",),
        takes={"tokens": "tokens"},
        reads=("extract", "target.dtype", *GATE),
        derived=("layer_ids", "capture_layer_ids", "last_state"),
        serve="extract",
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
        version=8,
        gives=("speculator",),
        takes={"tokens": "tokens", "features": "features", "vocab": "vocabulary"},
        reads=("train", "speculator", "target.dtype", *GATE),
        derived=("layer_ids", "capture_layer_ids"),
        drawn="features",
        trains=True,
    ),
    "evaluate": Kind(
        version=2,
        gives=("evaluation",),
        takes={"speculator": "speculator"},
        reads=("evaluate", "data", "prompts.eval_holdout_ratio", "target.dtype", "speculator.num_speculative_tokens"),
        datasets="evaluate.datasets",
        measures=True,
    ),
}
"""Every kind of stage by the name of its module in `speculators.stages`."""

DRAWING = ("extract.dtype", "extract.connector", "extract.concurrency", "extract.retries", "extract.timeout")
"""What a stage reads besides its own options where it draws hidden states from a server: those of `extract`, which it
stands in for then. The size of the shards is not among them, since none are left."""

KEEPING = ("extract.on_bad_row", "extract.connector", "extract.dtype", "extract.shard_tokens")
"""What a stage reads besides its own options where it answers and keeps the hidden states of its answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One stage of one recipe."""

    name: str
    kind: str
    inputs: Mapping[str, str]
    """Input name -> node, the fetching nodes included."""
    source: str = ""
    """What a `fetch` node fetches, as the recipe writes it."""
    wanted_as: str = ""
    """`checkpoint`, `file` or `directory`, for a `fetch` node."""
    keeps_states: bool = False
    """It answers, and some node takes the hidden states of its answers."""
    part: tuple[int, int] | None = None
    """Of a node that does a part of another one's work: which, from 0, and how many there are."""
    parts: tuple[str, ...] = ()
    """The nodes that share this one's work; it joins what they made, and is made of what they are made of."""

    @property
    def spec(self) -> Kind:
        return KINDS[self.kind]

    @property
    def needs(self) -> tuple[str, ...]:
        """The nodes that come before it."""
        return (*self.inputs.values(), *self.parts)

    @property
    def lazy(self) -> bool:
        """Made only when another node that has to be made wants it."""
        return self.kind == "fetch" or self.part is not None

    @property
    def draws(self) -> bool:
        """It draws hidden states from the pipeline's server while it runs."""
        return bool(self.spec.drawn) and self.spec.drawn not in self.inputs

    @property
    def mode(self) -> str:
        """The mode in which it needs the pipeline's server; empty if in none."""
        if self.parts:
            return ""
        return "extract" if self.keeps_states or self.draws else self.spec.serve

    @property
    def reads(self) -> tuple[str, ...]:
        """The options that it sees."""
        return (*self.spec.reads, *(DRAWING if self.draws else ()), *(KEEPING if self.keeps_states else ()))

    @property
    def derived(self) -> tuple[str, ...]:
        """The derived values that it sees."""
        return ("capture_layer_ids", "last_state") if self.keeps_states else self.spec.derived


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """A server that a stage needs while it runs."""

    name: str
    """The stage's name for it."""
    mode: str
    """`generate`, `extract`, `plain` or `speculative`."""
    dtype: Dtype
    """What the target computes in."""


def phases(node: Node, config: Config) -> list[list[Serving]]:
    """The servers a node needs, in the order in which it needs them: all of one phase are up together.

    Only `evaluate` has two phases: speed and acceptance in the dtype that is deployed, then, unless that is
    float32 already, losslessness in float32, where rounding cannot hide a fault.
    """
    if node.mode:
        return [[Serving(name=TARGET, mode=node.mode, dtype=config.target.dtype)]]
    if node.kind != "evaluate":
        return [[]]
    pair = [Serving(name=mode, mode=mode, dtype=config.target.dtype) for mode in ("plain", "speculative")]
    if config.target.dtype is Dtype.float32 or not config.evaluate.lossless_prompts:
        return [pair]
    return [pair, [Serving(name=f"{s.name}_float32", mode=s.mode, dtype=Dtype.float32) for s in pair]]


def build(config: Config) -> dict[str, Node]:
    """The nodes of a recipe in data-flow order.

    Raises:
        RecipeError: an unknown kind, a missing or unknown input, types that do not fit, or a cycle.
    """
    kinds = {name: wiring.get("uses", name) for name, wiring in config.pipeline.items()}
    _check_kinds(kinds)
    nodes: dict[str, Node] = {}
    for name, wiring in config.pipeline.items():
        if kinds[name] == SERVE:
            continue
        inputs = _wire(name, kinds, {k: v for k, v in wiring.items() if k != "uses"})
        spec = KINDS[kinds[name]]
        if spec.target:
            inputs[TARGET] = TARGET
            nodes[TARGET] = Node(
                name=TARGET, kind="fetch", inputs={}, source=config.target.source, wanted_as="checkpoint"
            )
        for dataset, options in (attrgetter(spec.datasets)(config) if spec.datasets else {}).items():
            fetch = f"dataset.{dataset}"
            inputs[fetch] = fetch
            wanted_as = _dataset_as(name, kinds[name], dataset, options)
            nodes[fetch] = Node(name=fetch, kind="fetch", inputs={}, source=options.source, wanted_as=wanted_as)
        nodes[name] = Node(name=name, kind=kinds[name], inputs=inputs)
    wanted = {node.inputs["states"] for node in nodes.values() if "states" in node.inputs}
    nodes = {name: replace(node, keeps_states=name in wanted) for name, node in nodes.items()}
    return _ordered(_shared_out(nodes, config.extract.workers))


def _shared_out(nodes: dict[str, Node], workers: int) -> dict[str, Node]:
    """Put nodes for the workers of an extraction before it, if there are several: `extract.1`, `extract.2`, ..."""
    if workers == 1:
        return nodes
    shared: dict[str, Node] = {}
    for name, node in nodes.items():
        parts = tuple(f"{name}.{i + 1}" for i in range(workers)) if node.kind == "extract" else ()
        shared |= {part: replace(node, name=part, part=(i, workers)) for i, part in enumerate(parts)}
        shared[name] = replace(node, parts=parts)
    return shared


def chosen(nodes: dict[str, Node], config: Config) -> dict[str, Node]:
    """What `until` or `only` leave of the graph: the stage and everything that it needs.

    Raises:
        RecipeError: `force`, `from`, `until` or `only` names no stage of the recipe.
    """
    for option, names in (("force", config.force), ("from", [config.from_]), ("until", [config.until]),
                          ("only", [config.only])):  # fmt: skip
        for name in filter(None, names):
            if name not in nodes:
                raise RecipeError(f"{option}={name}: the recipe has no stage `{name}`", closest(name, nodes))
    last = config.only or config.until
    if not last:
        return nodes
    needed, open_names = set(), [last]
    while open_names:
        name = open_names.pop()
        needed.add(name)
        open_names += nodes[name].needs
    option = f"only={config.only}" if config.only else f"until={config.until}"
    for again, names in (("from", [config.from_]), ("force", config.force)):
        for name in filter(None, names):
            if name not in needed:
                raise RecipeError(
                    f"{again}={name}: {option} leaves `{name}` out, so that nothing is made anew",
                    f"until={name}, or leave out {option}",
                )
    return {name: node for name, node in nodes.items() if name in needed}


def forced(nodes: Mapping[str, Node], config: Config) -> set[str]:
    """The stages of `force`, and of `from` with all that follow it."""
    follows = {config.from_} if config.from_ else set()
    for name, node in nodes.items():  # in data-flow order
        if follows & set(node.inputs.values()):
            follows.add(name)
    whole = {*config.force, *follows}
    return {*whole, *(part for name in whole if name in nodes for part in nodes[name].parts)}


def _check_kinds(kinds: Mapping[str, str]) -> None:
    known = {*KINDS, SERVE} - {"fetch"}
    for name, kind in kinds.items():
        if kind not in known:
            hint = closest(kind, known) + "; a second node of a kind says `uses: KIND`"
            raise RecipeError(f"pipeline.{name}: there is no stage `{kind}`", hint)
        if name == TARGET or name.startswith("dataset."):
            raise RecipeError(f"pipeline.{name}: this name is taken by the runner", "name the node otherwise")


def _wire(name: str, kinds: Mapping[str, str], wiring: Mapping[str, str]) -> dict[str, str]:
    """The artifact inputs of one node, checked; the server is checked too but is no artifact."""
    spec = KINDS[kinds[name]]
    wanted = {**spec.takes, **({TARGET: SERVE} if spec.serve else {})}
    if spec.drawn and TARGET in wiring:
        if spec.drawn in wiring:
            both = f"`{spec.drawn}` come from `{wiring[spec.drawn]}` or from a server, not from both"
            raise RecipeError(f"pipeline.{name}: {both}", f"leave out `{spec.drawn}` or `{TARGET}`")
        wanted = {**{slot: gives for slot, gives in wanted.items() if slot != spec.drawn}, TARGET: SERVE}
    for slot in wiring:
        if slot not in wanted:
            raise RecipeError(f"pipeline.{name}: `{kinds[name]}` takes no input `{slot}`", closest(slot, wanted))
    inputs = {}
    for slot, gives in wanted.items():
        upstream = wiring.get(slot)
        if upstream is None:
            or_draw = f", or `{TARGET}: {SERVE}` to draw them from the server" if slot == spec.drawn else ""
            hint = f"add `{slot}: NODE` of type {gives}{or_draw}"
            raise RecipeError(f"pipeline.{name}: the input `{slot}` is not wired", hint)
        if upstream not in kinds:
            raise RecipeError(f"pipeline.{name}.{slot}: there is no node `{upstream}`", closest(upstream, kinds))
        given = _gives(kinds[upstream])
        if gives not in given:
            fits = [n for n, k in kinds.items() if gives in _gives(k)]
            raise RecipeError(
                f"pipeline.{name}.{slot}: `{upstream}` gives {' and '.join(given)}, this input takes {gives}",
                f"wire it to {' or '.join(f'`{n}`' for n in fits) or 'a node that gives ' + gives}",
            )
        if gives != SERVE:
            inputs[slot] = upstream
    return inputs


def _dataset_as(name: str, kind: str, dataset: str, options: Dataset) -> str:
    """`file` or `directory`, whichever this kind of stage reads.

    Raises:
        RecipeError: the data set is the other.
    """
    adopts = options.format is DataFormat.upstream
    if adopts != KINDS[kind].adopts:
        wanted = "format upstream" if KINDS[kind].adopts else "a file of conversations"
        raise RecipeError(
            f"pipeline.{name}: `{kind}` reads data sets of {wanted}, {dataset} has format {options.format.name}",
            "pipeline=upstream is for directories of rows and hidden states, every other pipeline for conversations",
        )
    return "directory" if adopts else "file"


def _gives(kind: str) -> tuple[str, ...]:
    return (SERVE,) if kind == SERVE else KINDS[kind].gives


def _ordered(nodes: dict[str, Node]) -> dict[str, Node]:
    """Data-flow order; among nodes that are free to move, the order of the recipe."""
    sorter = graphlib.TopologicalSorter({name: node.needs for name, node in nodes.items()})
    try:
        order = list(sorter.static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(error.args[1])
        raise RecipeError(f"pipeline: the nodes wait for each other: {circle}", "break the circle") from None
    return {name: nodes[name] for name in order}
