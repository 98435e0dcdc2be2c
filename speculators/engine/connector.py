"""KV connector that exports hidden states from vLLM, and the vLLM scheduler that goes with it on a CPU.

vLLM loads the connector through `kv_connector_module_path` and the scheduler through `--scheduler-cls`. Both run inside
vLLM's processes, so this module imports only what these have: vllm, torch, safetensors, and modules of this package
that need no more.

- vLLM's method `extract_hidden_states` stores the residual streams of the captured layers in a paged cache of its own,
  like keys and values. When a request ends, its tokens are copied out of that cache and written to a file.
- Only requests that ask are exported: `"kv_transfer_params": {"hidden_states": true}`. With
  `"include_output_tokens": true` the file includes the answer, except its last token, which was never an input. So one
  server can generate and extract, and requests that only generate write no file.
- The answer carries `kv_transfer_params.hidden_states_file`, a name in the shared directory. The file appears by a
  rename, so it is complete: `hidden_states` [T, L, H] in the target's compute dtype, `token_ids` int64 [T]. With
  `dtype: float8_e4m3fn` they are quantized, and `scales` [T, L] in the target's dtype come with them (see
  `features.encoding`): half the bytes are copied from the device and written. If writing fails, `NAME.error` appears
  instead and holds the reason; the engine continues.
- The cache blocks of a request are kept until the copy is done, not until the file is written. On a GPU the copy runs
  on its own stream into pinned memory, and the model does not wait for it.
- Under tensor parallelism every rank has the same hidden states; rank 0 writes. Under pipeline parallelism vLLM passes
  those of earlier stages to the last one, which holds the cache; its tensor-parallel rank 0 writes. Data-parallel
  replicas are separate engines with a connector each; file names are random, so they can share the directory.

Server arguments: `kv_connector: HiddenStatesConnector`, `kv_connector_module_path: speculators.engine.connector`,
`kv_role: kv_producer`, `kv_connector_extra_config: {shared_storage_path: DIR, writers: 4, dtype: NAME}`; `writers` and
`dtype` are optional.
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
class SaveRequest:
    """The hidden states of one finished request, which a worker copies and writes."""

    request_id: str
    file: str
    """Name of the file in the shared directory."""
    token_ids: list[int]
    """The tokens whose hidden states are written, from the request's first."""
    block_ids: list[int]
    """The cache blocks that hold them, in order."""


@dataclass
class SaveBatch(KVConnectorMetadata):
    """The connector metadata that the scheduler sends to the workers at each step."""

    saves: list[SaveRequest] = field(default_factory=list)


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """Exports the hidden states of requests that ask for them.

    vLLM creates one instance in the scheduler and one in every worker; each uses its half of the methods. Methods
    without arguments of their own here are documented in vLLM's `KVConnectorBase_V1`.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        speculative = vllm_config.speculative_config
        if speculative is None or speculative.method != "extract_hidden_states":
            raise ValueError("HiddenStatesConnector needs --speculative_config with the method extract_hidden_states")
        _check_pipeline_parallelism(
            vllm_config.parallel_config.pipeline_parallel_size, getattr(vllm_config, "use_v2_model_runner", False)
        )
        extra = self._kv_transfer_config.kv_connector_extra_config
        if "shared_storage_path" not in extra:
            raise ValueError("HiddenStatesConnector needs kv_connector_extra_config.shared_storage_path")
        self._directory = Path(extra["shared_storage_path"])
        self._directory.mkdir(parents=True, exist_ok=True)
        self._quantize = _should_quantize(extra.get("dtype"), vllm_config.model_config.dtype)
        self._num_layers = len(speculative.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids)
        self._group = _hidden_states_group(kv_cache_config)
        # used by the scheduler
        self._finished: list[SaveRequest] = []
        # used by the workers
        self._cache: torch.Tensor | None = None
        self._writes = False
        self._stream: torch.cuda.Stream | None = None
        self._copy_events: dict[str, torch.cuda.Event] = {}
        self._write_threads = ThreadPoolExecutor(int(extra.get("writers", 4)), thread_name_prefix="hidden-states")

    # Methods that the scheduler calls.

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Report no external tokens: this connector only exports."""
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Do nothing: this connector only exports."""

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Schedule the export of a finished request that asked for it.

        Returns whether its cache blocks must be kept, and the `kv_transfer_params` of its answer.
        """
        params = request.kv_transfer_params or {}
        prompt = request.prompt_token_ids
        # The client of an aborted request is gone, and its hidden states may be incomplete.
        if not params.get("hidden_states") or prompt is None or request.status == RequestStatus.FINISHED_ABORTED:
            return False, None
        token_ids = list(request.all_token_ids)[:-1] if params.get("include_output_tokens") else list(prompt)
        # Not the request's id: it comes from the client and may hold path separators.
        file = f"{uuid.uuid4().hex}.safetensors"
        self._finished.append(
            SaveRequest(
                request_id=request.request_id,
                file=file,
                token_ids=token_ids,
                block_ids=list(block_ids[self._group]),
            )
        )
        return True, {"hidden_states_file": file}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Send the requests that finished since the last step to the workers."""
        saves, self._finished = self._finished, []
        return SaveBatch(saves)

    def get_finished_count(self) -> int:
        """One: only the writing rank reports that a request's blocks are free."""
        return 1

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """The cache layout that vLLM's own example connector requires, which keeps the layers of a token adjacent."""
        return ExampleHiddenStatesConnector.get_required_kvcache_layout(vllm_config)

    # Methods that the workers call.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the cache of hidden states among vLLM's caches, and check its layout.

        Raises:
            ValueError: this version of vLLM uses another layout.
        """
        layers = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        self._writes = _writes(sorted(layers), get_tensor_model_parallel_rank(), get_pp_group().is_last_rank)
        if not layers:
            return
        cache = kv_caches[next(iter(layers))]
        block_size = self._kv_cache_config.kv_cache_groups[self._group].kv_cache_spec.block_size
        if cache.dim() != 4 or tuple(cache.shape[1:3]) != (self._num_layers, block_size):
            raise ValueError(
                f"the cache of hidden states has shape {list(cache.shape)}, expected "
                f"[blocks, {self._num_layers} layers, {block_size} tokens, hidden size]: "
                "this version of vLLM is not supported"
            )
        self._cache = cache
        if cache.is_cuda:
            self._stream = torch.cuda.Stream(cache.device)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Do nothing: this connector only exports."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: this connector only exports."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: the model itself writes hidden states to the cache."""

    def wait_for_save(self) -> None:
        """Do nothing: hidden states are copied when their request has ended, in `get_finished`."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Start the copies of this step; returns the requests whose cache blocks can be reused, as sent requests."""
        if not self._writes:
            return None, None
        released = set()
        for save in self._metadata().saves:
            if not self._start_copy(save):
                released.add(save.request_id)
        for request_id, event in list(self._copy_events.items()):
            if event.query():
                del self._copy_events[request_id]
                released.add(request_id)
        return released or None, None

    def shutdown(self) -> None:
        """Wait for the files that are being written."""
        self._write_threads.shutdown(wait=True)

    def _metadata(self) -> SaveBatch:
        metadata = self._connector_metadata
        return metadata if isinstance(metadata, SaveBatch) else SaveBatch()

    def _start_copy(self, save: SaveRequest) -> bool:
        """Start the copy of one request; true if it continues after this call."""
        path = self._directory / save.file
        try:
            tensors, event = self._copy(save)
        except Exception as error:  # one request must not stop the engine; the client reads NAME.error
            _write_error(path, error)
            return False
        if event is not None:
            self._copy_events[save.request_id] = event
        self._write_threads.submit(_write, path, tensors, save.token_ids, event)
        return event is not None

    def _copy(self, save: SaveRequest) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
        """Copy a request's hidden states to host memory, as the file holds them.

        Returns the tensors, and the CUDA event after which they are valid; None if they are already.
        """
        assert self._cache is not None
        block_size = self._cache.shape[2]
        tokens, capacity = len(save.token_ids), len(save.block_ids) * block_size
        if tokens > capacity:
            raise ValueError(f"the request has {tokens} tokens, and its cache blocks hold {capacity}")
        position = torch.arange(tokens)
        block = torch.tensor(save.block_ids)[position // block_size]
        if self._stream is None:
            return _encode(_gather_tokens(self._cache, block, position % block_size), self._quantize), None
        device = self._cache.device
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            # From pinned memory: a copy from pageable memory would block the model's thread.
            block = block.pin_memory().to(device, non_blocking=True)
            offset = (position % block_size).pin_memory().to(device, non_blocking=True)
            tensors = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for name, tensor in _encode(_gather_tokens(self._cache, block, offset), self._quantize).items()
            }
            event = torch.cuda.Event()
            event.record(self._stream)
        return tensors, event


class ExtractionScheduler(Scheduler):
    """vLLM's scheduler without verification, for servers on a CPU that export hidden states.

    vLLM implements `extract_hidden_states` as a speculative method: every step "drafts" the token that was just
    sampled, and the next step verifies it, so generating would compute two tokens per step where one is needed. The
    hidden states are in the cache by the time the draft is made, so it can be dropped.
    """

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Drop the draft."""


def _check_pipeline_parallelism(stages: int, model_runner_v2: bool) -> None:
    """Check that the hidden states of earlier pipeline stages reach the last one, which only model runner V2 does.

    Raises:
        ValueError: they would not.
    """
    if stages > 1 and not model_runner_v2:
        raise ValueError(
            f"hidden states under pipeline parallelism ({stages} stages) need vLLM's model runner V2, and this server "
            "runs V1: set VLLM_USE_V2_MODEL_RUNNER=1, or use tensor parallelism"
        )


def _writes(layers: Sequence[str], tensor_rank: int, last_stage: bool) -> bool:
    """Whether this rank writes the files: tensor-parallel rank 0 of the last pipeline stage.

    `layers` are the names of the cache layers on this rank.

    Raises:
        ValueError: there is not exactly one on the last pipeline stage, or there is one on an earlier stage.
    """
    if len(layers) != last_stage:
        stage = "the last pipeline stage" if last_stage else "an earlier pipeline stage"
        raise ValueError(f"{int(last_stage)} layers should keep hidden states on {stage}, there are {list(layers)}")
    return last_stage and tensor_rank == 0


def _hidden_states_group(kv_cache_config: KVCacheConfig) -> int:
    """Index of the KV cache group that holds the hidden states.

    Raises:
        ValueError: there is not exactly one.
    """
    groups = kv_cache_config.kv_cache_groups
    candidates = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates and len(groups) == 1:  # all layers of this model share one group
        return 0
    raise ValueError(f"{len(candidates)} of {len(groups)} KV cache groups hold hidden states, expected 1")


def _gather_tokens(cache: torch.Tensor, block: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Copy tokens out of a paged cache [blocks, L, block size, H].

    `block` and `offset`, int64 [T], give the position of each token. Returns [T, L, H], contiguous.
    """
    return cache.transpose(1, 2)[block, offset].contiguous()


def _should_quantize(export_dtype: str | None, compute_dtype: str | torch.dtype) -> bool:
    """Whether hidden states are exported in float8; otherwise in the target's compute dtype.

    Raises:
        ValueError: another dtype is requested, or dequantizing float8 to the compute dtype could overflow.
    """
    if export_dtype is None:
        return False
    if export_dtype != str(FLOAT8).removeprefix("torch.") or compute_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"kv_connector_extra_config.dtype is {export_dtype} and the target computes in {compute_dtype}: "
            "set it to float8_e4m3fn for a bfloat16 or float32 target, or leave it out"
        )
    return True


def _encode(hidden_states: torch.Tensor, quantized: bool) -> dict[str, torch.Tensor]:
    """The tensors of the file for hidden states [T, L, H], on the same device."""
    if not quantized:
        return {"hidden_states": hidden_states}
    values, scales = quantize(hidden_states)
    return {"hidden_states": values, "scales": scales.to(hidden_states.dtype)}


def _write(path: Path, tensors: dict[str, torch.Tensor], token_ids: list[int], event: torch.cuda.Event | None) -> None:
    """Write one file, in a thread of the pool: wait for the copy, write to a temporary name, rename."""
    temporary = path.with_suffix(".part")
    try:
        if event is not None:
            event.synchronize()
        save_file({**tensors, "token_ids": torch.tensor(token_ids, dtype=torch.int64)}, temporary)
        os.replace(temporary, path)
    except Exception as error:  # the thread has no caller; the client reads NAME.error
        temporary.unlink(missing_ok=True)
        _write_error(path, error)


def _write_error(path: Path, error: Exception) -> None:
    """Log an error, and write it to `NAME.error`, where the client that waits for the file finds it."""
    logger.error("hidden states for %s: %s: %s", path.name, type(error).__name__, error)
    error_file, temporary = path.with_name(f"{path.name}.error"), path.with_suffix(".error-part")
    try:
        temporary.write_text(f"{type(error).__name__}: {error}")
        os.replace(temporary, error_file)
    except OSError:
        logger.exception("%s could not be written either", error_file)
