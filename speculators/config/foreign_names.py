"""Names of other tools for our options. An error about such a name has the right name as its hint; none is an alias."""

from __future__ import annotations

RENAMED: dict[str, str] = {
    # transformers and trl
    "learning_rate": "train.lr",
    "max_grad_norm": "train.max_grad_norm",
    "clip": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "grad_clip": "train.max_grad_norm",
    "clip_grad": "train.max_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "mixed_precision": "train.precision",
    "torch_dtype": "target.dtype",
    "dtype": "target.dtype",
    "per_device_train_batch_size": "train.batch_tokens",
    "train_batch_size": "train.batch_tokens",
    "batch_size": "train.batch_tokens",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "gradient_checkpointing": "train.activation_checkpointing",
    "recompute": "train.activation_checkpointing",
    "grad_accum": "train.gradient_accumulation_steps",
    "accumulate": "train.gradient_accumulation_steps",
    "accumulate_grad_batches": "train.gradient_accumulation_steps",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "scheduler_type": "train.schedule",
    "scheduler": "train.schedule",
    "optim": "train.optimizer",
    "warmup": "train.warmup_ratio",
    "warmup_steps": "train.warmup_ratio",
    "scheduler_warmup_steps": "train.warmup_ratio",
    "cooldown": "train.decay_ratio",
    "adam_beta1": "train.adamw_betas",
    "adam_beta2": "train.adamw_betas",
    "enable_thinking": "target.chat_template_kwargs",
    "reasoning_effort": "target.chat_template_kwargs",
    "date_string": "target.chat_template_kwargs",
    "betas": "train.adamw_betas",
    "adam_epsilon": "train.adamw_eps",
    "adamw_lr": "train.lr",
    "logging_steps": "train.log_every_steps",
    "log_freq": "train.log_every_steps",
    "log_every": "train.log_every_steps",
    "save_steps": "train.save_every_epochs",
    "checkpoint_freq": "train.save_every_epochs",
    "keep_every": "train.save_every_epochs",
    "report_to": "train.trackers",
    "logger": "train.trackers",
    "run_name": "train.tracker_project",
    "patience": "train.early_stopping_patience",
    "validation": "train.validation_ratio",
    "train_data_ratio": "train.validation_ratio",
    "ddp": "train.num_processes",
    "processes": "train.num_processes",
    "sharded": "train.fsdp",
    "num_workers": "train.prefetch_batches",
    "prefetch_factor": "train.prefetch_batches",
    "lookahead": "train.prefetch_batches",
    "explodes_at": "train.loss_spike_factor",
    "supervise_prompts": "train.train_on_prompts",
    # vLLM
    "max_model_len": "max_seq_len",
    "sequence_length": "max_seq_len",
    "max_length": "max_seq_len",
    "max_seq_length": "max_seq_len",
    "total_seq_len": "max_seq_len",
    "seq_length": "max_seq_len",
    "tensor_parallel_size": "serve.tensor_parallel",
    "pipeline_parallel_size": "serve.pipeline_parallel",
    "data_parallel_size": "serve.data_parallel",
    "endpoint": "serve.url",
    "vllm_endpoint": "serve.url",
    "also": "serve.extra_urls",
    "states": "serve.hidden_states_dir",
    "hidden_states_path": "serve.hidden_states_dir",
    # upstream speculators
    "verifier_name_or_path": "target.source",
    "model_name_or_path": "target.source",
    "model": "target.source",
    "fidelity": "target.min_greedy_agreement",
    "reference_gib": "target.max_reference_gib",
    "speculator_type": "speculator.algorithm",
    "draft_vocab_size": "vocab.size",
    "draft_hidden_act": "speculator.draft_arch",
    "num_draft_layers": "speculator.num_layers",
    "layer_ids": "speculator.target_layer_ids",
    "aux_hidden_state_layer_ids": "speculator.target_layer_ids",
    "eagle_aux_hidden_state_layer_ids": "speculator.target_layer_ids",
    "heads": "speculator.num_attention_heads",
    "key_value_heads": "speculator.num_key_value_heads",
    "ttt_steps": "speculator.ttt_steps",
    "num_ttt_steps": "speculator.ttt_steps",
    "ttt_length": "speculator.ttt_steps",
    "ttt_step_loss_decay": "speculator.ttt_step_decay",
    "ttt_drawn": "speculator.ttt_random_steps",
    "ttt_one_step_share": "speculator.ttt_warmup_ratio",
    "loss": "speculator.loss_fn",
    "regression": "speculator.hidden_loss_weight",
    "train_head": "speculator.train_lm_head",
    "train_embeddings": "speculator.embed_requires_grad",
    "anchors": "speculator.max_anchors",
    "block_size": "speculator.block_size",
    # data and evaluation
    "max_samples": "prompts.num_conversations",
    "count": "prompts.num_conversations",
    "turns": "prompts.max_turns",
    "hold_out": "prompts.eval_holdout_ratio",
    "datasets": "evaluate.datasets",
    "sets": "evaluate.datasets",
    "cluster": "executor.name",
    "output_dir": "run.dir",
}
"""Last part of an unknown name -> full name of the option that has its meaning."""

CHANGED_MEANING: dict[str, str] = {
    "train.precision": "bfloat16, float16 or float32",
    "train.batch_tokens": "tokens in one optimizer step over all devices",
    "train.warmup_ratio": "a share of all steps",
    "train.save_every_epochs": "epochs between checkpoints",
    "train.trackers": "a list, as [wandb]",
}
"""Values of the options above whose values differ from those of the other tool."""


def hint(name: str) -> str | None:
    """Hint for the unknown option `name`; None if no other tool's name matches.

    Dashes count as underscores, and the section before the last dot is ignored.
    """
    option = RENAMED.get(name.rpartition(".")[2].replace("-", "_"))
    if option is None or option == name:
        return None
    values = f" ({CHANGED_MEANING[option]})" if option in CHANGED_MEANING else ""
    return f"the option is `{option}`{values}"
