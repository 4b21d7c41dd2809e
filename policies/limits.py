"""Every bound of the mind, each with its default and its reason.

Owns the numbers. Decides nothing; whoever needs a bound is handed this value."""

from __future__ import annotations

from dataclasses import dataclass

PerClass = tuple[float, float, float]  # indexed by RequestClass


@dataclass(frozen=True, slots=True)
class Limits:
    """Defaults are start values for one router process in front of up to 64 workers."""

    # Who may be here at all.
    workers_max: int = 256  # a bit each in every index node: 256 bits are 60 bytes a node
    requests_max: int = 16_384  # all states together; about 2 KB each, so 32 MB

    # Tokenising: CPU work that a client can cause for free, so it is the first queue.
    tokenising_max: int = 64  # in flight; the text pool has fewer threads, so it never runs dry
    tokenising_per_tenant: int = 16  # in flight for one class of one tenant: nobody owns the pool
    tokenise_queue_max: int = 1_024  # waiting for one class of one tenant

    # The waiting room, in GPU-seconds a worker: as much as the class's patience can drain.
    room_s: PerClass = (30.0, 600.0, 900.0)
    room_new_share: float = 0.9  # new sessions see a smaller room: a turn in mid-session has sunk KV
    stage_s: float = 0.25  # a head may go to a worker with less prefill than this queued: one step's hard cap
    pass_share: float = 0.5  # of its patience or deadline: whoever waits longer is not passed by its own class
    pass_max: int = 4  # asked behind a head that stays ...
    pass_every_s: float = 0.01  # ... and not more often than this: each costs as much as a head
    staged_batch_max: int = 4  # data-processor requests on a worker before their first token: late binding
    reserve: PerClass = (0.0, 0.05, 0.01)  # share of GPU-seconds that a class gets while a more urgent one waits
    fair_quantum_s: float = 0.5  # how far a tenant may run ahead of the least served before urgency stops counting
    tenants_max: int = 4_096  # fairness accounts kept
    reexamine_s: float = 0.002  # heads are not re-examined more often: 64 workers send 3,000 frames a second
    pump_max: int = 4  # placements out of the waiting room in one event, so that one event stays under 1 ms

    # Trying again.
    attempts_max: int = 3  # placements of one request
    retry_ratio: float = 0.1  # retries a placement earns: the 10 % retry budget
    retry_burst: int = 256  # one dead worker's requests at once
    retry_after_max_s: float = 60.0  # interactive clients give up on more
    retry_after_jitter: float = 0.2  # spreads the returns of one refused burst

    # Coming back after a refusal.
    reservation_s: float = 10.0  # room is kept so long from the time that the client was told
    reservation_share: float = 0.05  # of a class's waiting room, for all that one tenant was told
    reservations_max: int = 4_096

    # What is remembered.
    index_every_block: int = 4  # one chain key in so many is indexed; 1 in the embedded profile
    index_nodes_per_worker: int = 65_536  # 16M tokens of 64-token blocks; about 15 MB a worker when full
    seen_keys_max: int = 65_536  # a generation of 15 minutes; five are kept, about 40 MB when full
    sessions_max: int = 16_384
    templates_max: int = 4_096
    task_slack_max_s: float = 60.0  # that a background agent's turns may hand on: four turns' first tokens; 0: nothing
    lengths_max: int = 1_024  # output histograms, 32 floats each
