"""Draft models, one file an algorithm.

To add one: write `drafts/NAME.py` with a subclass of `base.Draft`, put it into `DRAFTS`, its options into
`config.algorithms.SPECULATORS`, and its defaults into `conf/speculator/NAME.yaml`. A test holds the lists together.
"""

from __future__ import annotations

from speculators.drafts.base import Draft
from speculators.drafts.dflash import DFlashDraft
from speculators.drafts.eagle3 import Eagle3Draft

DRAFTS: dict[str, type[Draft]] = {"eagle3": Eagle3Draft, "dflash": DFlashDraft}
