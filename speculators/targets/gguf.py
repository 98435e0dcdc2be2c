"""GGUF file -> an ordinary bfloat16 checkpoint, so that everything after it sees one kind of target."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from speculators.errors import SourceError


def dequantize_gguf(gguf: Path, directory: Path) -> None:
    """Write the model in `gguf` into `directory` as a bfloat16 checkpoint with tokenizer and chat template.

    The quantised blocks are computed in float32 and rounded once, without any calibration: the same file
    gives the same bytes under the same version of transformers.

    Raises:
        SourceError: transformers cannot read the file.
    """
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Newer releases keep the quantised blocks unless told otherwise; older ones know only how to dequantise.
    config = getattr(transformers, "GgufConfig", None)
    how = {"quantization_config": config(dequantize=True)} if config else {}
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, **how)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except (ImportError, OSError, ValueError, KeyError, NotImplementedError) as error:
        raise SourceError(
            f"transformers {transformers.__version__} cannot read {gguf.name}: {error}",
            "use a GGUF file of an architecture that it supports, or the model's own safetensors checkpoint",
        ) from error
    # What is left is an ordinary model; a checkpoint that calls itself quantised would be loaded as one.
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__["hf_quantizer"] = None
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
