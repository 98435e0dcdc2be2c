"""Executes a plan: the walk through the graph, devices, attempts, signals, events.

Verbs import `execute`, `events`, `signals` and `lease`. Planning asks `schedule` whether a machine can run a recipe;
executors and servers import `endings`, `events`, `lease` and `schedule`, and never `execute`.
"""
