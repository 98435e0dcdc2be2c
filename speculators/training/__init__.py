"""Training a draft: loss, optimisers, the loop, and the state that a killed run goes on from."""
