"""Converts a GGUF file to an ordinary bfloat16 checkpoint, so that all other code sees one kind of target."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from speculators.errors import SourceError


def dequantize_gguf(gguf: Path, directory: Path) -> None:
    """Write the model in `gguf` into `directory` as a bfloat16 checkpoint with tokenizer and chat template.

    The quantised blocks are dequantised in float32 and rounded once, without any calibration: the same file
    gives the same bytes under the same version of transformers.

    Raises:
        SourceError: transformers cannot read the file.
    """
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Newer releases keep the quantised blocks by default; older ones always dequantise.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    except (ImportError, OSError, ValueError, KeyError, NotImplementedError) as error:
        raise SourceError(
            f"transformers {transformers.__version__} cannot read {gguf.name}: {error}",
            "use a GGUF file of an architecture that it supports, or the model's own safetensors checkpoint",
        ) from error
    # The model is not quantised any more; with this entry in its config it would be loaded as if it were.
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__["hf_quantizer"] = None
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
