"""The mind: pure decisions. (event, now) goes in, actions come out; no socket, clock, chance or log in here."""
