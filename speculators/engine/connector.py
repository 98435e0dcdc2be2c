"""The part of vLLM that hands out hidden states: a KV connector, loaded through `kv_connector_module_path`, and a
scheduler that goes with it, loaded through `--scheduler-cls`.

It runs inside vLLM's own processes, so it imports only what they have: vllm, torch, safetensors; of ours, what needs
no more than that.

- vLLM's method `extract_hidden_states` keeps the residual streams of the wanted layers in a cache of its own, block by
  block as keys and values. When a request ends, its rows are copied out of that cache and written to a file.
- Only requests that ask are served: `"kv_transfer_params": {"hidden_states": true}`, and with
  `"include_output_tokens": true` the states of the answer too, all but its last token, which was never an input. So one
  server generates and extracts, and generating pays for no file.
- The answer carries `kv_transfer_params.hidden_states_file`, a name in the shared directory. The file appears by a
  rename, whole or not at all: `hidden_states` [T, L, H] in the dtype the target computes in, `token_ids` int64 [T].
  With `dtype: float8_e4m3fn` they are float8, and `scales` [T, L] in the target's dtype go with them (see
  `features.encoding`): half the bytes leave the device and pass through the shared directory.
  Where writing fails, `NAME.error` appears instead and says why; the engine goes on.
- Blocks are held until the copy is done, not until the file is written. On an accelerator the copy runs on its own
  stream into pinned memory and the model does not wait for it.
- Under tensor parallelism every rank holds the same states; the first one writes. Under pipeline parallelism vLLM hands
  the states of earlier stages on to the last one, where the cache is: that stage's first rank writes. Copies of the
  target (data parallelism) are engines of their own, each with its connector; the files' names are drawn, so that they
  may share the directory.

Server arguments: `kv_connector: HiddenStatesConnector`, `kv_connector_module_path: speculators.engine.connector`,
`kv_role: kv_producer`, `kv_connector_extra_config: {shared_storage_path: DIR, writers: 4, dtype: NAME}`, the last two
where they are wanted.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec
from vllm.v1.request import RequestStatus

from speculators.features.encoding import FLOAT8, quantize

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import DraftTokenIds
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Save:
    """What the worker has to copy for one finished request."""

    request_id: str
    file: str
    token_ids: list[int]
    block_ids: list[int]


@dataclass
class Saves(KVConnectorMetadata):
    """From the scheduler to the workers, once a step."""

    saves: list[Save] = field(default_factory=list)


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM makes one in the scheduler and one in every worker; each uses its half."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        speculative = vllm_config.speculative_config
        if speculative is None or speculative.method != "extract_hidden_states":
            raise ValueError("HiddenStatesConnector needs --speculative_config with the method extract_hidden_states")
        _check_stages(
            vllm_config.parallel_config.pipeline_parallel_size, getattr(vllm_config, "use_v2_model_runner", False)
        )
        extra = self._kv_transfer_config.kv_connector_extra_config
        if "shared_storage_path" not in extra:
            raise ValueError("HiddenStatesConnector needs kv_connector_extra_config.shared_storage_path")
        self._directory = Path(extra["shared_storage_path"])
        self._directory.mkdir(parents=True, exist_ok=True)
        self._quantises = _quantises(extra.get("dtype"), vllm_config.model_config.dtype)
        self._layers = len(speculative.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids)
        self._group = _group_of_states(kv_cache_config)
        # the scheduler's half
        self._finished: list[Save] = []
        # the workers' half
        self._cache: torch.Tensor | None = None
        self._writes = False
        self._stream: torch.cuda.Stream | None = None
        self._copying: dict[str, torch.cuda.Event] = {}
        self._writers = ThreadPoolExecutor(int(extra.get("writers", 4)), thread_name_prefix="hidden-states")

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Nothing is ever loaded."""
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is ever loaded."""

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Promise a file to a request that asked for one. Returns (hold its blocks, what its answer carries)."""
        wanted = request.kv_transfer_params or {}
        prompt = request.prompt_token_ids
        # Nobody waits for an aborted request, and its states may be incomplete.
        if not wanted.get("hidden_states") or prompt is None or request.status == RequestStatus.FINISHED_ABORTED:
            return False, None
        token_ids = list(request.all_token_ids)[:-1] if wanted.get("include_output_tokens") else list(prompt)
        # The name is ours: a request's id comes from the client and may hold anything.
        file = f"{uuid.uuid4().hex}.safetensors"
        self._finished.append(
            Save(
                request_id=request.request_id,
                file=file,
                token_ids=token_ids,
                block_ids=list(block_ids[self._group]),
            )
        )
        return True, {"hidden_states_file": file}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Hand what finished since the last step to the workers."""
        saves, self._finished = self._finished, []
        return Saves(saves)

    def get_finished_count(self) -> int:
        """One rank reports a request, not all of them."""
        return 1

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """The layout in which a token's layers lie together. Its name is vLLM's affair and changes with it."""
        return ExampleHiddenStatesConnector.get_required_kvcache_layout(vllm_config)

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the cache that holds the states, and check that it is laid out as `_rows` reads it."""
        layers = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        self._writes = _writes(sorted(layers), get_tensor_model_parallel_rank(), get_pp_group().is_last_rank)
        if not layers:
            return
        cache = kv_caches[next(iter(layers))]
        block_size = self._kv_cache_config.kv_cache_groups[self._group].kv_cache_spec.block_size
        if cache.dim() != 4 or tuple(cache.shape[1:3]) != (self._layers, block_size):
            raise ValueError(
                f"the cache of hidden states is {list(cache.shape)}, "
                f"not [blocks, {self._layers} layers, {block_size} tokens, width]: this vLLM lays it out otherwise"
            )
        self._cache = cache
        if cache.is_cuda:
            self._stream = torch.cuda.Stream(cache.device)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is ever loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is ever loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """The model itself has put the states into the cache."""

    def wait_for_save(self) -> None:
        """States are taken when their request has ended, in `get_finished`."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Start the copies of this step; report the requests whose blocks are free to be reused."""
        if not self._writes:
            return None, None
        released = set()
        for save in self._metadata().saves:
            if not self._start(save):
                released.add(save.request_id)
        for request_id, event in list(self._copying.items()):
            if event.query():
                del self._copying[request_id]
                released.add(request_id)
        return released or None, None

    def shutdown(self) -> None:
        """Finish what is being written."""
        self._writers.shutdown(wait=True)

    def _metadata(self) -> Saves:
        metadata = self._connector_metadata
        return metadata if isinstance(metadata, Saves) else Saves()

    def _start(self, save: Save) -> bool:
        """Start one copy; true if it goes on after this call."""
        path = self._directory / save.file
        try:
            tensors, event = self._copy(save)
        except Exception as error:  # one request's trouble must not end the engine; the client is told
            _report(path, error)
            return False
        if event is not None:
            self._copying[save.request_id] = event
        self._writers.submit(_write, path, tensors, save.token_ids, event)
        return event is not None

    def _copy(self, save: Save) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
        """What the file will hold of the states, in host memory, and the event after which it is there."""
        assert self._cache is not None
        block_size = self._cache.shape[2]
        tokens, room = len(save.token_ids), len(save.block_ids) * block_size
        if tokens > room:
            raise ValueError(f"{tokens} tokens, but blocks for {room}")
        position = torch.arange(tokens)
        block = torch.tensor(save.block_ids)[position // block_size]
        if self._stream is None:
            return _leaving(_rows(self._cache, block, position % block_size), self._quantises), None
        device = self._cache.device
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            # From pinned memory, so that no copy makes the model's thread wait.
            block = block.pin_memory().to(device, non_blocking=True)
            offset = (position % block_size).pin_memory().to(device, non_blocking=True)
            tensors = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for name, tensor in _leaving(_rows(self._cache, block, offset), self._quantises).items()
            }
            event = torch.cuda.Event()
            event.record(self._stream)
        return tensors, event


class StatesScheduler(Scheduler):
    """vLLM's scheduler for servers on a CPU, deaf to proposals.

    By its form `extract_hidden_states` is a speculative method: every step "proposes" the token that was just sampled,
    and the next one verifies it in vain, so that generating computes two rows where one is needed. By the time that
    a proposal is made the states are in their cache, and it can be dropped.
    """

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Nothing is verified."""


def _check_stages(stages: int, hands_on: bool) -> None:
    """Raise ValueError where the states of earlier pipeline stages would not reach the last one."""
    if stages > 1 and not hands_on:
        raise ValueError(
            f"hidden states under pipeline parallelism ({stages} stages) need vLLM's model runner V2, and this server "
            "runs V1: VLLM_USE_V2_MODEL_RUNNER=1, or tensor parallelism"
        )


def _writes(layers: Sequence[str], tensor_rank: int, last_stage: bool) -> bool:
    """Whether a rank writes the files, by the layers that keep states there.

    Raises:
        ValueError: it is not one on the last pipeline stage, and none on the others.
    """
    if len(layers) != last_stage:
        where = "the last pipeline stage" if last_stage else "an earlier pipeline stage"
        raise ValueError(f"{int(last_stage)} layers should keep hidden states on {where}, there are {list(layers)}")
    return last_stage and tensor_rank == 0


def _group_of_states(kv_cache_config: KVCacheConfig) -> int:
    """Which of the groups of cache blocks is that of the hidden states."""
    groups = kv_cache_config.kv_cache_groups
    found = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
    if len(found) == 1:
        return found[0]
    if not found and len(groups) == 1:  # every layer of this model shares its blocks
        return 0
    raise ValueError(f"{len(found)} of {len(groups)} groups of cache blocks hold hidden states, one should")


def _rows(cache: torch.Tensor, block: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Tokens by block and offset, [T, L, H], out of a cache [blocks, L, tokens in a block, H]; a copy."""
    return cache.transpose(1, 2)[block, offset].contiguous()


def _quantises(wanted: str | None, computed: str | torch.dtype) -> bool:
    """Whether states are to leave in float8.

    Raises:
        ValueError: in anything else, or what the target computes in cannot hold them again.
    """
    if wanted is None:
        return False
    if wanted != str(FLOAT8).removeprefix("torch.") or computed not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"kv_connector_extra_config.dtype is {wanted} and the target computes in {computed}: "
            "float8_e4m3fn out of bfloat16 or float32 is possible, or leave it out"
        )
    return True


def _leaving(states: torch.Tensor, quantises: bool) -> dict[str, torch.Tensor]:
    """The states [T, L, H] as they go into the file, on the device where they are."""
    if not quantises:
        return {"hidden_states": states}
    quantized, scales = quantize(states)
    return {"hidden_states": quantized, "scales": scales.to(states.dtype)}


def _write(path: Path, tensors: dict[str, torch.Tensor], token_ids: list[int], event: torch.cuda.Event | None) -> None:
    """In a writer thread: wait for the copy, write beside, rename."""
    beside = path.with_suffix(".part")
    try:
        if event is not None:
            event.synchronize()
        save_file({**tensors, "token_ids": torch.tensor(token_ids, dtype=torch.int64)}, beside)
        os.replace(beside, path)
    except Exception as error:  # the thread has no caller; whoever waits for the file is told
        beside.unlink(missing_ok=True)
        _report(path, error)


def _report(path: Path, error: Exception) -> None:
    logger.error("hidden states for %s: %s: %s", path.name, type(error).__name__, error)
    failed, beside = path.with_name(f"{path.name}.error"), path.with_suffix(".error-part")
    try:
        beside.write_text(f"{type(error).__name__}: {error}")
        os.replace(beside, failed)
    except OSError:
        logger.exception("%s could not be written either", failed)
