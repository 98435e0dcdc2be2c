"""Servers of a target from the runner's side: command lines, processes and whoever ends them.

Import `vllm` for what is asked of an engine, `server` for one process, `pool` for those of a run. `guard` stands by
itself, since it is also run as a program; `threads` are the variables that keep processes to their cores.
"""
