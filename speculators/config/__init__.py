"""What a recipe may say, and how words become one.

Both sides of the line import `schema`, `choices`, `algorithms` and `fields`, which need nothing that has to be
installed. Only the runner imports `compose`, the one door to Hydra, `composed`, which does without it where it can,
and `shipped`, which knows where recipes lie.
"""
