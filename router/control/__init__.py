"""The live mind: facts in, actions out, recorded so that they can be replayed."""
