"""What there is to do: the graph of a recipe, keys, the plan, and what is told of it before anything runs.

`graph`, `key`, `derive` and `sources` know the recipe alone, and all of the runner imports them. `plan`, `explain`,
`estimate` and `lockfile` look into the store and at the machine too; only execution and verbs import those.
"""
