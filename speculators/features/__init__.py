"""Hidden states: their files, and how they get from the disk or a server into a batch.

`shards` reads and writes the files, `encoding` has their dtypes, `contract` what they are of, `writer` the part of the
stages that write them. `dataloader` makes packed batches (`batch`), with `prefetch`, `io` and `disk_cache`; `upstream`
reads and writes the files of the PyPI package speculators. Nothing here imports drafts, engine or training.
"""
