"""Hidden states, from the disk or a server to a batch.

`shards` are files of them, `encoding` their bytes, `contract` what a set of them is, `writer` what stages fill it with;
`dataloader` makes a `batch.PackedBatch` of them, through `prefetch`, `io` and `disk_cache`; `upstream` reads upstream's
files. Whatever reads or writes states imports from here; this imports of drafts, engine and training nothing.
"""
