"""The runner: composes nothing, computes nothing, knows no tensor. It plans, starts, stops and keeps.

`planning`: what there is to do; `store`: what is there; `servers` and `executors`: what is started; `execution`: doing
it. `doctor` and `history` look at what was done. Nothing here imports torch, transformers, vllm or datasets, and only
verbs import it, but for the worker, which claims and publishes through `store`.
"""
