"""Prints a row of a token table as JSON, with its text: `python -m speculators.data.token_view TABLE TARGET ROW`.

A process of its own, because what `speculators-run show` imports stays light.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from speculators.data.token_table import TokenTable


def main(table: Path, target: Path, number: int) -> dict[str, Any]:
    """Row `number` of `table`, decoded with the tokenizer of `target`, or `{"rows": N}` if there are no more than N."""
    tokens = TokenTable(table)
    if not 0 <= number < len(tokens):
        return {"rows": len(tokens)}
    decode = _decoder(target)
    ids, mask = tokens.token_ids(number).tolist(), tokens.loss_mask(number).tolist()
    spans = [
        {"supervised": bool(flag), "text": decode([token for token, _ in group]), "tokens": len(group)}
        for flag, items in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
        if (group := list(items))
    ]
    facts = {"row": number, "rows": len(tokens), "id": tokens.conversations[number], "tokens": len(ids)}
    return {**facts, "supervised": sum(mask), "spans": spans, "input_ids": ids, "loss_mask": mask}


def _decoder(target: Path) -> Any:
    """A function from token ids to their text; without transformers where there is a `tokenizer.json`."""
    if (path := target / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(path))
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
