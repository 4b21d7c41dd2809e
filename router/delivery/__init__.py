"""One request under way: its order, its relay to a worker, its answer to the client."""
