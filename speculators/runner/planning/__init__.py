"""Planning: the graph of a recipe, its keys, the plan, and the checks and estimates before anything runs.

`graph`, `key`, `derive` and `sources` depend on the recipe alone, and all of the runner imports them. `plan`,
`explain`, `estimate` and `lockfile` also read the store and the machine; only execution and verbs import those.
"""
