"""The stages of the pipeline: one module each, with `main(job)`. A stage imports neither another one nor the runner.

`head -1 speculators/stages/*.py` prints what each stage reads and writes.
"""
