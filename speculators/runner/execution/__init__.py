"""Doing what was planned: the walk through the graph, devices, attempts, signals, events.

Verbs import `execute`, `events`, `signals` and `lease`. Planning asks `schedule` whether a machine can do what a
recipe wants; executors and servers import `endings`, `events`, `lease` and `schedule`, and never `execute`.
"""
