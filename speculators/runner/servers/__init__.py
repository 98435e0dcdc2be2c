"""Starts and stops vLLM servers from the runner's side: command lines, environments, processes.

Import `vllm` for what a server is started with, `server` for one process, `pool` for the servers of a run. `guard` is
also run as a program, so it imports nothing of this package; `threads` limits processes to their cores.
"""
