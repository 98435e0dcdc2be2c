"""The runner: composes nothing, computes nothing, knows no tensor. It plans, starts, stops and keeps.

Imports go one way: key, graph, store < derive < plan < execute. None of them imports torch, transformers, vllm
or datasets.
"""
